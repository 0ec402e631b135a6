"""Promises of the routes that tell a job what to do."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from chainfed_ray.cluster.jobs.store import JobStore
from tests.apps import an_app
from tests.builders import SPEC


@pytest.fixture
def client(store: JobStore) -> Iterator[TestClient]:
    with TestClient(an_app(store), "http://localhost", raise_server_exceptions=False) as made:
        yield made


def test_a_job_pauses_goes_on_and_is_cancelled(client: TestClient, store: JobStore) -> None:
    job = store.submit(SPEC).id

    def ask(what: str) -> tuple[int, str]:
        answer = client.post(f"/v1/jobs/{job}/{what}")
        return answer.status_code, answer.json()["status"]

    assert ask("pause") == (202, "paused")
    assert ask("resume") == (202, "queued")
    store.move(job, "running")
    assert ask("pause") == (202, "pausing")
    assert ask("resume") == (202, "running")
    assert ask("cancel") == (202, "cancelling")
    refused = client.post(f"/v1/jobs/{job}/pause")
    assert refused.status_code == 409
    assert refused.json()["type"] == "urn:chainfed:problem:job-conflict"
    assert refused.json()["detail"] == f"job {job} is cancelling; it cannot be paused"
    assert client.post("/v1/jobs/none/pause").status_code == 404
