"""Promises of the whole service to two tenants: keys and rules reach every process that `chainfed serve` starts."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.api.client.service_client import ServiceClient
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import AccessDenied, InvalidJob, JobNotFound, ModelNotFound, ServiceFailed
from tests.project import COMMAND
from tests.services import Running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def clients(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Iterator[dict[str, ServiceClient]]:
    """A client for each owner of a key. The service reads the tiny model and the tiny data, and nothing else."""
    keys = KeyStore(Storage.at(tmp_path / "storage").database)
    scopes = {"alice": ["submit", "read", "infer"], "bob": ["submit", "read", "infer"], "ops": ["admin"]}
    tokens = {owner: keys.make_key(owner, scopes[owner]).token for owner in scopes}
    keys.close()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CHAINFED_DATA_ROOTS", str(tiny_data.parent))
        environment.setenv("CHAINFED_MODEL_ROOTS", str(tiny_model_folder))
        environment.setenv("CHAINFED_QUEUED_JOBS", "1")
        with Running(tmp_path / "storage") as service:
            made = {owner: ServiceClient(service.address, token) for owner, token in tokens.items()}
            made["nobody"] = ServiceClient(service.address)
            yield made
            for client in made.values():
                client.close()


def test_two_tenants_and_their_operator(
    clients: dict[str, ServiceClient], document: dict[str, Any], tmp_path: Path
) -> None:
    alice, bob, ops, nobody = (clients[who] for who in ("alice", "bob", "ops", "nobody"))
    with pytest.raises(AccessDenied):
        nobody.submit(document)
    for outside in ("/etc/passwd", str(tmp_path / "none.csv")):
        with pytest.raises(InvalidJob, match="CHAINFED_DATA_ROOTS"):
            alice.submit({**document, "data": {**document["data"], "train": f"path:{outside}"}})

    document["rounds"] |= {"total": 2}
    job = alice.submit(document)["id"]
    assert [event["kind"] for event in alice.follow(job)][-1] == "succeeded"
    assert alice.classify("tiny:tiny", ["salt tide wave"])["results"][0]["label"] == "sea"
    assert ops.classify("alice/tiny:tiny", ["salt tide wave"])["job"] == job
    for name in ("tiny:tiny", "alice/tiny:tiny", "tiny"):
        with pytest.raises(ModelNotFound):
            bob.classify(name, ["salt tide wave"])
    for ask in (bob.job, bob.cancel, lambda job: next(bob.follow(job))):
        with pytest.raises(JobNotFound):
            ask(job)
    assert (bob.jobs(), [found["tenant"] for found in ops.jobs()]) == ([], ["alice"])

    long = {**document, "rounds": {**document["rounds"], "total": 500}}
    running = bob.submit(long)["id"]
    assert next(event for event in bob.follow(running) if event["kind"] == "round")
    waiting = bob.submit(long)["id"]
    with pytest.raises(ServiceFailed, match="bob has a queue of 1, as many as CHAINFED_QUEUED_JOBS allows"):
        bob.submit(long)
    for left in (waiting, running):
        bob.cancel(left)


def test_a_key_and_a_service_for_the_network(tmp_path: Path) -> None:
    """Without a key, it is refused before anything starts."""
    environment = {**os.environ, "CHAINFED_STORAGE": str(tmp_path / "storage")}
    command = [*COMMAND, "serve", "--host", "0.0.0.0", "--port", "65001"]
    refused = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert refused.returncode == 1
    assert "error: --host is '0.0.0.0'; expected 127.0.0.1, as long as no key was made" in refused.stderr
