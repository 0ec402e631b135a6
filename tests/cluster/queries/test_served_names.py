"""Promises of the names of models: two bases of one last name have two, and each keeps its own."""

from collections.abc import Iterator

import pytest

from chainfed_ray.cluster.jobs.control import delete
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.spec.parse import parse_job
from tests.builders import SPEC


@pytest.fixture
def store(database: str) -> Iterator[JobStore]:
    made = JobStore(database)
    yield made
    made.close()


def test_two_bases_of_one_last_name_do_not_take_each_others_names(store: JobStore) -> None:
    def submit(base: str, tenant: str = "default") -> str:
        document = SPEC.document() | {"name": "mine"}
        document["model"]["base"] = base
        return store.seen_by(tenant, everything=False).submit(parse_job(document)).model

    name = submit("hf:one/llama")
    assert name == "llama:mine"
    marked = submit("hf:two/llama")
    assert marked != name
    assert marked.startswith("llama-")
    assert submit("hf:two/llama@" + 40 * "a") == marked
    assert submit("hf:one/llama@" + 40 * "b") == name
    assert submit("hf:one/LLAMA") == "LLAMA:mine"
    assert submit("hf:two/llama", "another") == name, "each tenant has names of its own"
    for job in store.page():
        if job.model == name:
            store.move(job.id, "cancelled")
            delete(store, job.id)
    assert submit("hf:two/llama") == marked, "it keeps the name that its callers know"
