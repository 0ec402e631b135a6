"""Promises of ``chainfed keys``: a key is shown once, and mistakes are told in words."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.storage import Storage
from tests.project import COMMAND


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "CHAINFED_STORAGE": str(tmp_path / "storage")}


def chainfed(environment: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    """The exit code of ``chainfed keys``, and what it prints."""
    done = subprocess.run(
        [*COMMAND, "keys", *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_key_from_its_making_to_its_end(environment: dict[str, str], tmp_path: Path) -> None:
    code, said, _ = chainfed(
        environment, "create", "--owner", "alice", "--scopes", "submit, read", "--requests-per-minute", "77"
    )
    assert code == 0
    token = said.split()[-1]
    keys = KeyStore(Storage.at(tmp_path / "storage").database, existing=True)
    identity = keys.authenticate(token)
    assert identity is not None
    assert (identity.owner, identity.scopes, identity.requests_per_minute) == ("alice", {"submit", "read"}, 77)

    code, said, _ = chainfed(environment, "list", "--json")
    (listed,) = json.loads(said)["keys"]
    assert (code, listed["id"], listed["revoked_at"]) == (0, identity.key, None)
    assert listed.keys().isdisjoint({"hash", "token"})
    table = chainfed(environment, "list")[1]
    assert "77" in table
    assert token.rpartition("_")[2] not in said + table

    code, said, _ = chainfed(environment, "revoke", identity.key, "--json")
    assert (code, json.loads(said)["id"]) == (0, identity.key)
    assert keys.authenticate(token) is None
    assert "revoked" in chainfed(environment, "list")[1]
    keys.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "--owner", "A b", "--scopes", "read"], "owner is 'A b'; expected 1 to 63 lower-case letters"),
        (["create", "--owner", "a", "--scopes", "write"], "scopes is 'write'; expected some of submit, read"),
        (["create", "--owner", "a", "--scopes", "read", "--expires", "soon"], "--expires is 'soon'; expected a number"),
        (["revoke", "0123"], "there is no key '0123'"),
    ],
)
def test_a_mistake_is_told_in_words(environment: dict[str, str], arguments: list[str], words: str) -> None:
    if arguments[0] == "revoke":
        assert chainfed(environment, "create", "--owner", "a", "--scopes", "read")[0] == 0
    code, said, told = chainfed(environment, *arguments, "--json")
    assert code == 1
    assert words in told
    error: dict[str, Any] = json.loads(said)["error"]
    assert words in error["message"]


@pytest.mark.slow
def test_a_list_on_a_fresh_machine_makes_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    code, _, told = chainfed(environment, "list")
    assert code == 1
    assert "CHAINFED_DATABASE is 'sqlite:///" in told
    assert "expected a database that answers (unable to open database file)" in told
    assert list(tmp_path.iterdir()) == []
