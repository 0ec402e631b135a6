"""Promises of the names of models: two bases of one last name have two, and each keeps its own."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import create_engine
from sqlalchemy import text as sql

from chainfed_ray.cluster.jobs.control import delete
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.records.states import Status
from chainfed_ray.spec.parse import parse_job
from tests.builders import SPEC


@pytest.fixture
def store(database: str) -> Iterator[JobStore]:
    made = JobStore(database)
    yield made
    made.close()


@pytest.mark.slow
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


def test_what_a_job_serves_is_there_from_its_start_until_it_is_over(store: JobStore) -> None:
    job = store.submit(SPEC)

    def serves_in(to: Status) -> bool:
        assert store.move(job.id, to)
        found = [store.bases(), store.on_base("minilm", 1), store.of_model(job.model)]
        assert len(set(map(bool, found))) == 1
        return bool(found[0])

    before: tuple[Status, ...] = ("validating", "pausing", "paused", "queued", "validating", "failed", "queued")
    assert [state for state in before if serves_in(state)] == []
    assert serves_in("running")
    store.publish(job.id, "started", "started", {})
    after: tuple[Status, ...] = ("pausing", "paused", "queued", "validating", "pausing", "running", "cancelling")
    assert [state for state in after if not serves_in(state)] == []
    assert not serves_in("cancelled")
    assert serves_in("queued"), "it is tried again"
    assert not store.move(job.id, "failed")
    assert serves_in("running")
    assert not serves_in("failed")


def names(store: JobStore, base: str, *jobs: str) -> list[str]:
    """The names under which the models of ``jobs``, submitted one after the other, are served."""
    document = SPEC.document() | {"model": SPEC.document()["model"] | {"base": base}}
    return [store.submit(parse_job(document | {"name": job})).model for job in jobs]


def write(database: str, statement: str, **values: str) -> None:
    engine = create_engine(database)
    with engine.begin() as connection:
        connection.execute(sql(statement), values)
    engine.dispose()


@pytest.mark.slow
def test_a_name_stays_whatever_other_jobs_come(store: JobStore, database: str) -> None:
    """Both bases have names without a mark, as those from before there were marks; the newest is of the second base."""
    names(store, "hf:one/llama", "a")
    (marked,) = names(store, "hf:two/llama", "b")
    write(database, "update jobs set model = 'llama:b' where model = :marked", marked=marked)
    assert names(store, "hf:one/llama", "a", "c") == ["llama:a", "llama:c"]
    assert names(store, "hf:two/llama", "b", "d") == ["llama:b", marked.replace(":b", ":d")]
    assert names(store, "hf:one/llama", "a", "e") == ["llama:a", "llama:e"]


@pytest.mark.slow
def test_a_document_that_cannot_be_read_names_no_other_job(store: JobStore, database: str) -> None:
    names(store, "hf:one/llama", "a", "b")
    for document in ("[]", "{}", '{"model": 5}', '{"model": {}}'):
        write(database, "update jobs set spec = :document where name = 'a'", document=document)
        assert names(store, "hf:one/llama", "a", "c") == ["llama:a", "llama:c"]
        assert names(store, "hf:two/llama", "a") != ["llama:a"]


@pytest.mark.slow
def test_two_bases_that_come_at_once_have_two_names(store: JobStore) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda base: names(store, f"hf:{base}/llama", "a"), "abcdefgh"))
    assert len({name for (name,) in found}) == 8
