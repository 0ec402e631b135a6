"""Promises of what is remembered of jobs' rounds: it is what all rounds come to, and no round is read twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from sqlalchemy import event

from chainfed_ray.cluster.jobs.control import delete
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.jobs.versions import Trained, trained
from chainfed_ray.cluster.tables import EventRow, JobRow
from chainfed_ray.records.result import ExitScore
from chainfed_ray.records.rounds import Round
from tests.builders import SPEC, a_round, a_start

Row = TypeVar("Row", EventRow, JobRow)
STARTED = a_start(layers=4, start=0)
LOSSES = (2.0, None, 1.0, 3.0, 1.0, None, 4.0)  # of the whole model, after each round


@pytest.fixture
def store(database: str) -> Iterator[JobStore]:
    made = JobStore(database)
    yield made
    made.close()


@pytest.fixture
def read() -> Iterator[list[EventRow]]:
    """The events that were read from the database."""
    with _loaded(EventRow) as found:
        yield found


@pytest.fixture
def rows() -> Iterator[list[JobRow]]:
    """The rows of jobs that were read from the database."""
    with _loaded(JobRow) as found:
        yield found


@contextmanager
def _loaded(kind: type[Row]) -> Iterator[list[Row]]:
    """The rows of one ``kind`` that are read within a block."""
    found: list[Row] = []

    def note(row: Row, _: object) -> None:
        found.append(row)

    event.listen(kind, "load", note)
    yield found
    event.remove(kind, "load", note)


def training(store: JobStore) -> str:
    job = store.submit(SPEC).id
    store.move(job, "running")
    store.publish(job, "started", "started", STARTED.model_dump(mode="json") | {"classes": ["sea", "soil"]})
    return job


def commit(store: JobStore, job: str, index: int) -> Round:
    loss = LOSSES[index % len(LOSSES)]
    evaluation: Any = None if loss is None else {"engine": "torch", "loss": loss, "accuracy": 0.5, "seconds": 1.0}
    record = a_round(index, STARTED, exit=index % 3, top=index % 3)
    data = record.model_dump(mode="json") | {"evaluation": evaluation}
    store.publish(job, f"round-{index}", "round", data)
    return record


def found(store: JobStore, version: Any) -> Trained:
    stack = trained(store, SPEC.model_name, version)
    assert stack is not None
    return stack


@pytest.mark.slow
def test_it_is_what_all_rounds_come_to(store: JobStore, database: str) -> None:
    """As a process sees it that has asked after each round, and as one sees it that asks for the first time."""
    job, records = training(store), list[Round]()
    assert trained(store, SPEC.model_name, "latest") is None
    best = (0, 0, 2, 2, 4, 4, 4)
    for index, expected in enumerate(best):
        records.append(commit(store, job, index))
        other = JobStore(database)
        for asked in (store, other):
            newest = found(asked, "latest")
            assert (newest.record.id, newest.stack.index, newest.classes) == (job, index, ("sea", "soil"))
            assert found(asked, "best").stack.index == found(asked, expected).stack.index == expected
            assert tuple(newest.exits) == ExitScore.of(records, STARTED.layers)
        other.close()
    assert trained(store, SPEC.model_name, 3) is None, "its stack is kept no more"
    assert [score.layers for score in found(store, "latest").exits] == [1, 2, 3]


@pytest.mark.slow
def test_without_an_evaluation_the_newest_is_the_best(store: JobStore) -> None:
    job = training(store)
    for index in range(3):
        store.publish(job, f"round-{index}", "round", {"index": index})
        assert found(store, "best").stack.index == index


@pytest.mark.slow
def test_what_nobody_has_trained_is_no_model(store: JobStore) -> None:
    """Of rounds without a quorum nothing is served; after one that counts, the stack stays as it was in those that do not."""
    job = training(store)
    for index, counted in enumerate((False, False, True, False)):
        data = a_round(index, STARTED, counted=counted).model_dump(mode="json")
        store.publish(job, f"round-{index}", "round", data)
        newest = trained(store, SPEC.model_name, "latest")
        assert (newest and newest.stack.index) == (None if index < 2 else index)


@pytest.mark.slow
def test_a_request_reads_no_round_that_was_read_before(store: JobStore, read: list[EventRow]) -> None:
    job = training(store)
    for index in range(20):
        commit(store, job, index)
    found(store, "best")
    assert len(read) == 21, "once, all of them, and the start"
    read.clear()
    for version in ("latest", "best", 19):
        found(store.seen_by("default", everything=True), version)
    assert not read
    commit(store, job, 20)
    assert found(store, "latest").stack.index == 20
    found(store, "best")
    assert len(read) == 1


@pytest.mark.slow
def test_a_models_documents_are_read_once_and_it_is_the_newest_all_the_same(
    store: JobStore, rows: list[JobRow]
) -> None:
    def finished(accuracy: float) -> str:
        job = store.submit(SPEC).id
        store.move(job, "running")
        store.move(job, "succeeded", result={"classes": [], "accuracy": accuracy})
        return job

    def called(part: JobStore) -> tuple[str, Any] | None:
        record = part.model(SPEC.model_name)
        return (record.id, (record.result or {})["accuracy"]) if record else None

    assert called(store) is None
    first = finished(0.5)
    assert called(store) == (first, 0.5)
    rows.clear()
    for _ in range(3):
        assert called(store.seen_by("default", everything=False)) == (first, 0.5)
        assert called(store.seen_by("other", everything=False)) is None
    assert not rows
    second = finished(0.75)
    assert called(store) == (second, 0.75)
    delete(store, second)
    assert called(store) == (first, 0.5)
