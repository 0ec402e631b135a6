"""Promises of the key ring: a request costs no query, a revoked key ends within seconds, a new one counts at once."""

import asyncio
from collections.abc import Iterator

import pytest
from sqlalchemy.exc import OperationalError

from chainfed_ray.cluster.access.identity import Identity
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.access.keys import Key, KeyStore
from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.cluster.storage import Storage
from tests.watching import wait_for

UNKNOWN = f"cfr_{'0' * 16}_{'0' * 64}"


class Counting(KeyStore):
    """Keys whose queries are counted. While ``broken`` is set, the database does not answer."""

    queries, reads, uses, broken = 0, 0, 0, False

    def state(self) -> tuple[int, int]:
        self.queries += 1
        if self.broken:
            raise OperationalError("select", None, Exception("the database is gone"))
        return super().state()

    def keys(self, *filters: object) -> list[Key]:  # type: ignore[override]
        self.reads += 1
        return super().keys()

    def note_use(self, key: str) -> None:
        self.uses += 1
        super().note_use(key)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        self.now += 1e-6  # a clock goes on
        return self.now


@pytest.fixture
def store(storage: Storage) -> Iterator[Counting]:
    made = Counting(storage.database)
    yield made
    made.close()


def test_requests_share_a_query_until_it_is_old(store: Counting) -> None:
    token = store.make_key("a", ["read"]).token
    clock = Clock()
    ring = KeyRing(store, 3.0, clock)

    async def ask() -> None:
        for _ in range(50):
            assert await ring.identify(token)
            assert not await ring.is_open()
        assert store.queries == 1
        clock.now += 3.1
        assert await ring.identify(token)

    asyncio.run(ask())
    assert (store.queries, store.reads) == (2, 1), "the keys are the same"


def test_requests_that_wait_for_a_database_share_its_failure(store: Counting) -> None:
    store.make_key("a", ["read"])
    ring = KeyRing(store, 3.0, Clock())

    async def ask() -> None:
        store.broken = True
        found = await asyncio.gather(*(ring.is_open() for _ in range(50)), return_exceptions=True)
        assert all(isinstance(one, NO_ANSWER) for one in found)
        assert len({id(one) for one in found}) == 50, "an error that many raise keeps the frames of all"
        assert store.queries == 1, "one that takes long fails for all who wait, and not for one after the other"
        store.broken = False
        assert not await ring.is_open(), "who comes later has a try of their own"

    asyncio.run(ask())


def test_a_revoked_key_ends_as_soon_as_the_keys_are_read_again(store: Counting) -> None:
    made = store.make_key("a", ["read"])
    clock = Clock()
    ring = KeyRing(store, 3.0, clock)

    async def ask() -> list[Identity | None]:
        found = [await ring.identify(made.token)]
        store.revoke(made.key.id)
        clock.now += 2.9
        found.append(await ring.identify(made.token))
        clock.now += 0.2
        return [*found, await ring.identify(made.token)]

    identity = made.key.identity
    assert asyncio.run(ask()) == [identity, identity, None]


def test_a_new_key_counts_at_once_and_opens_or_closes_nothing_else(store: Counting) -> None:
    ring = KeyRing(store, 3.0, Clock())

    async def ask() -> None:
        assert await ring.is_open()
        made = store.make_key("a", ["read"])
        assert await ring.identify(made.token) == made.key.identity
        assert not await ring.is_open()
        store.revoke(made.key.id)
        assert not await KeyRing(store).is_open(), "a service that had a key does not open when it is revoked"

    asyncio.run(ask())


def test_unknown_keys_that_come_together_cost_a_query_or_two(store: Counting) -> None:
    ring = KeyRing(store, 3.0, Clock())

    async def ask() -> None:
        assert await asyncio.gather(*(ring.identify(UNKNOWN) for _ in range(200))) == [None] * 200

    asyncio.run(ask())
    assert store.queries <= 2


def test_nobody_is_let_in_by_what_was_known_before_a_database_fell_silent(store: Counting) -> None:
    token = store.make_key("a", ["read"]).token
    clock = Clock()
    ring = KeyRing(store, 3.0, clock)

    async def ask() -> None:
        assert await ring.identify(token)
        store.broken = True
        assert await ring.identify(token), "it need not be asked yet"
        clock.now += 3.1
        with pytest.raises(OperationalError):
            await ring.identify(token)
        with pytest.raises(OperationalError):
            await ring.is_open()
        store.broken = False
        assert await ring.identify(token)

    asyncio.run(ask())


def test_a_use_is_noted_once_an_hour_and_beside_the_request(store: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store.make_key("a", ["read"])
    ring = KeyRing(store, 3.0, Clock())
    hour = "2026-01-01T10:00:00.000Z"
    monkeypatch.setattr("chainfed_ray.cluster.access.keyring.this_hour", lambda: hour)

    async def ask() -> None:
        for _ in range(5):
            assert await ring.identify(made.token)

    asyncio.run(ask())
    wait_for(lambda: store.keys()[0].used_at, "use on record")
    assert store.uses == 1
    hour = "2026-01-01T11:00:00.000Z"
    asyncio.run(ask())
    wait_for(lambda: store.uses == 2, "use on record")
