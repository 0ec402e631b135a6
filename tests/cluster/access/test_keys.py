"""Promises of the keys: a token lets in its owner and nobody else, and is kept nowhere."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from chainfed_ray.cluster.access.keys import KeyStore, parts_of, this_hour
from chainfed_ray.errors import InvalidSetting, KeyNotFound

DAY = timedelta(days=1)


@pytest.fixture
def keys(database: str) -> Iterator[KeyStore]:
    made = KeyStore(database)
    yield made
    made.close()


@pytest.mark.slow
def test_a_token_names_its_owner_and_what_it_allows(keys: KeyStore) -> None:
    made = keys.make_key("alice", ["read", "submit"], "laptop", DAY)
    found = keys.authenticate(made.token)
    assert found == made.key.identity
    assert (found.key, found.tenant, found.name, found.site) == (made.key.id, "alice", "laptop", None)
    assert found.allows("read")
    assert found.allows("submit")
    assert not found.allows("infer")
    assert not found.allows("admin")


def test_a_key_has_its_own_limit_of_requests(keys: KeyStore) -> None:
    made = keys.make_key("alice", ["read"], requests_per_minute=60)
    found = keys.authenticate(made.token)
    assert found is not None
    assert (found.requests_per_minute, keys.keys()[0].document()["requests_per_minute"]) == (60, 60)
    for wrong in ({"scopes": ["read"], "requests_per_minute": 0}, {"scopes": ["site"], "requests_per_minute": 5}):
        with pytest.raises(InvalidSetting, match=r"requests-per-minute is '.'; expected 1 to 1000000"):
            keys.make_key("alice", name="north", **wrong)


def test_admin_is_allowed_everything_but_to_be_a_site(keys: KeyStore) -> None:
    admin = keys.make_key("ops", ["admin"]).key.identity
    assert [scope for scope in ("submit", "read", "infer", "admin", "site") if admin.allows(scope)] == [
        "submit", "read", "infer", "admin",
    ]  # fmt: skip


def test_a_sites_key_has_the_sites_name(keys: KeyStore) -> None:
    made = keys.make_site_key("hospital-a")
    found = keys.authenticate(made.token)
    assert found is not None
    assert (found.site, found.scopes) == ("hospital-a", {"site"})
    keys.make_site_key("hospital-b")
    assert [key.id for key in keys.keys(scope="site", name="hospital-a")] == [made.key.id]


def test_a_revoked_key_and_one_that_has_expired_let_nobody_in(keys: KeyStore) -> None:
    revoked, expired = keys.make_key("a", ["read"]), keys.make_key("a", ["read"], "", timedelta(milliseconds=1))
    assert keys.revoke(revoked.key.id).revoked_at
    assert keys.revoke(revoked.key.id) == keys.keys()[0], "to revoke it twice changes nothing"
    while expired.key.is_valid():
        pass
    assert keys.authenticate(revoked.token) is None
    assert keys.authenticate(expired.token) is None
    with pytest.raises(KeyNotFound, match="chainfed keys list"):
        keys.revoke("none")
    with pytest.raises(KeyNotFound):
        keys.revoke("a\0b")


def test_the_id_of_one_key_with_the_secret_of_another_lets_nobody_in(keys: KeyStore) -> None:
    tokens = [keys.make_key(owner, ["read"]).token for owner in ("a", "b")]
    (first, secret), (second, _) = (token.removeprefix("cfr_").split("_") for token in tokens)
    assert keys.authenticate(f"cfr_{first}_{secret}")
    assert keys.authenticate(f"cfr_{second}_{secret}") is None
    assert keys.authenticate(f"cfr_{first}_{'0' * 64}") is None


@pytest.mark.slow
@given(st.text() | st.from_regex(r"cfr_[0-9a-f]{16}_[0-9a-f]{64}", fullmatch=True).map(lambda token: token + "\n"))
def test_what_has_not_the_form_of_a_token_is_none(token: str) -> None:
    assert parts_of(token) is None


def test_the_database_has_no_secret(keys: KeyStore, database: str) -> None:
    made = keys.make_key("a", ["read"])
    secret = made.token.rpartition("_")[2]
    engine = create_engine(database)
    with engine.connect() as connection:
        rows = str(connection.execute(text("select * from keys")).all())
    engine.dispose()
    assert made.key.id in rows
    for told in (rows, repr(made.key), str(made.key.document())):
        assert secret not in told
    assert made.key.hash in rows
    assert made.key.hash not in repr(made.key) + str(made.key.document())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "scopes", "name", "seconds", "field"),
    [
        ("", ["read"], "", 1, "owner"),
        ("a/b", ["read"], "", 1, "owner"),
        ("A", ["read"], "", 1, "owner"),
        ("a", [], "", 1, "scopes"),
        ("a", ["write"], "", 1, "scopes"),
        ("a", ["site", "read"], "b", 1, "scopes"),
        ("a", ["site"], "", 1, "scopes"),
        ("a", ["read"], "x" * 101, 1, "name"),
        ("a", ["read"], "a\nb", 1, "name"),
        ("a", ["read"], "", 0, "expires"),
    ],
)
def test_what_is_wrong_is_named(
    keys: KeyStore, owner: str, scopes: list[str], name: str, seconds: float, field: str
) -> None:
    with pytest.raises(InvalidSetting) as caught:
        keys.make_key(owner, scopes, name, timedelta(seconds=seconds))
    assert caught.value.name == field
    assert keys.keys() == []


def test_a_site_without_a_name_has_no_key(keys: KeyStore) -> None:
    with pytest.raises(InvalidSetting, match="site is"):
        keys.make_site_key("../x")


def test_a_time_beyond_the_calendar_is_the_end_of_it(keys: KeyStore) -> None:
    made = keys.make_key("a", ["read"], "", timedelta(days=999_999))
    assert made.key.is_valid()


def test_a_use_is_on_record_to_the_hour(keys: KeyStore) -> None:
    key = keys.make_key("a", ["read"]).key
    before = this_hour()
    keys.note_use(key.id)
    (used,) = keys.keys()
    assert used.used_at in (before, this_hour())
    assert before.endswith(":00:00.000Z")


@pytest.mark.slow
def test_whatever_happens_to_keys_changes_their_state(keys: KeyStore) -> None:
    states = [keys.state()]
    first, second = (keys.make_key("a", ["read"]).key.id for _ in range(2))
    states.append(keys.state())
    for key in (first, second, second):
        keys.revoke(key)
        states.append(keys.state())
    keys.make_key("a", ["read"])
    assert [*states, keys.state()] == [(0, 0), (2, 0), (2, 1), (2, 2), (2, 2), (3, 2)]
