"""Promises of the Python client about keys: it sends the one it has, and says what is refused."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from chainfed_ray.api.sdk import calls
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.api.sdk.keys import read_key
from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.errors import AccessDenied, InvalidSetting, JobNotFound
from tests.apps import an_app, served


@pytest.fixture
def address(store: JobStore, keys: KeyStore) -> Iterator[str]:
    """The application behind a real HTTP server."""
    with served(an_app(store, AccessRules(KeyRing(keys), "nobody"))) as made:
        yield made


@pytest.mark.slow
def test_the_key_of_the_environment_and_of_a_file(
    address: str, keys: KeyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, asks = (keys.make_key("a", [scope]).token for scope in ("read", "infer"))
    client = Client(address)
    with pytest.raises(AccessDenied, match="the request has no key"):
        client.json(calls.list_jobs())
    client.close()

    monkeypatch.setenv("CHAINFED_API_KEY", reads)
    client = Client(address)
    assert client.send(calls.list_jobs()).jobs == []
    with pytest.raises(JobNotFound):
        client.json(calls.get_job("none"))
    with pytest.raises(AccessDenied, match="allows read; this needs submit"):
        client.json(calls.cancel_job("none"))
    client.close()

    file = tmp_path / "key"
    file.write_text(f"{asks}\n")
    client = Client(address, read_key(file))
    with pytest.raises(AccessDenied, match="allows infer; this needs read"):
        client.json(calls.list_jobs())
    client.close()


@pytest.mark.parametrize("text", ["two words", "two\nlines", "", "café"])
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(InvalidSetting, match="--key-file") as refused:
        read_key(file)
    assert not text or not re.search(re.escape(text), str(refused.value))
    with pytest.raises(InvalidSetting, match="a file that can be read"):
        read_key(tmp_path / "none")
    if text:
        monkeypatch.setenv("CHAINFED_API_KEY", text)
        with pytest.raises(InvalidSetting, match="CHAINFED_API_KEY"):
            Client("http://127.0.0.1:9")
