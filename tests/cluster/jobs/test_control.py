"""Promises of what people ask of a job: it gets there, or they hear why not; one that goes on has the bits of any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.activity import Note
from chainfed_ray.client.messages import Client, Training, TurnOrder
from chainfed_ray.client.pool import ClientPool, LocalPool
from chainfed_ray.cluster.jobs.control import cancel, pause, resume
from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.tables import Status
from chainfed_ray.errors import JobConflict, JobNotFound, LimitReached
from chainfed_ray.federation.run import MakePool, in_this_process
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.model.source import ModelSource
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.spec.parse import parse_job
from tests.builders import SPEC, a_job, assert_same, run
from tests.pools import Altered, Answer

ROUNDS, CLIENTS = 4, 3


def asking(ask: Callable[[], object], turns: int) -> MakePool:
    """Pools in which ``ask`` is called during the turn with the number ``turns``, counted over all pools."""
    left = iter(range(turns, -1, -1))

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        if isinstance(order, Training) and next(left, None) == 0:
            ask()
        return answer

    def make(source: ModelSource, note: Note) -> ClientPool:
        return Altered(LocalPool(source), alter)

    return make


@pytest.fixture
def expected(document: dict[str, Any], tmp_path: Path) -> Any:
    """The tensors of the job when nobody asks anything of it."""
    document["rounds"] |= {"total": ROUNDS, "clients": CLIENTS}
    return run(a_job(document, tmp_path), tmp_path / "undisturbed")[1]


def test_a_job_that_pauses_after_any_round_ends_with_the_same_bits(
    document: dict[str, Any], expected: Any, storage: Storage, store: JobStore
) -> None:
    job = store.submit(parse_job(document)).id
    for done in range(ROUNDS):
        store.move(job, "running" if done else "validating")
        run_queued_job(job, storage, asking(lambda: pause(store, job), turns=1))
        found = store.get(job)
        assert (found.status, found.activity) == ("paused", None)
        assert len(CommitLog(storage.job(job)).rounds()) == done + 1, (
            "the round that ran is committed, and no other begins"
        )
        run_queued_job(job, storage, in_this_process)  # by a process that Ray makes again
        assert store.get(job).status == "paused"
        assert resume(store, job).status == "queued"
    store.move(job, "running")
    run_queued_job(job, storage, in_this_process)
    assert store.get(job).status == "succeeded"
    assert_same(load_stack(storage.model(job)).stack.tensors(), expected)
    kinds = [event.kind for event in store.events(job)]
    again = ["paused", "queued", "running"]
    assert kinds == [
        "queued", "validating", "running", "started", *(["pausing", "round", *again] * ROUNDS), "finished", "succeeded"
    ]  # fmt: skip


def test_a_job_that_is_resumed_before_it_has_paused_goes_on_at_once(
    document: dict[str, Any], expected: Any, storage: Storage, store: JobStore
) -> None:
    job = store.submit(parse_job(document)).id
    store.move(job, "running")

    def ask() -> None:
        pause(store, job)
        resume(store, job)

    run_queued_job(job, storage, asking(ask, turns=4))
    assert store.get(job).status == "succeeded"
    assert_same(load_stack(storage.model(job)).stack.tensors(), expected)


def in_state(store: JobStore, state: Status) -> str:
    """A job that got to ``state`` by itself and by what was asked of it."""
    job = store.submit(SPEC).id
    ways: dict[Status, tuple[Status, ...]] = {"queued": (), "paused": ("running", "pausing"), "cancelled": ()}
    for before in ways.get(state, ("running",)):
        assert store.move(job, before)
    assert store.get(job).status == state or store.move(job, state)
    return job


@pytest.mark.parametrize(
    ("ask", "state", "leads_to"),
    [
        (pause, "queued", "paused"),
        (pause, "running", "pausing"),
        (pause, "pausing", "pausing"),
        (pause, "paused", "paused"),
        (pause, "cancelling", "it is cancelling; it cannot be paused"),
        (pause, "succeeded", "it is succeeded; it cannot be paused"),
        (pause, "failed", "it is failed; it cannot be paused"),
        (resume, "queued", "queued"),
        (resume, "running", "running"),
        (resume, "pausing", "running"),
        (resume, "paused", "queued"),
        (resume, "cancelled", "it is cancelled; it cannot be resumed"),
        (cancel, "queued", "cancelled"),
        (cancel, "running", "cancelling"),
        (cancel, "pausing", "cancelling"),
        (cancel, "paused", "cancelling"),
        (cancel, "cancelled", "cancelled"),
        (cancel, "failed", "it is failed; it cannot be cancelled"),
    ],
)
def test_what_is_asked_of_a_job_leads_to_its_state_or_is_refused_in_words(
    ask: Callable[[JobStore, str], Any], state: Status, leads_to: str, store: JobStore
) -> None:
    job = in_state(store, state)
    if leads_to.startswith("it is"):
        with pytest.raises(JobConflict) as refused:
            ask(store, job)
        assert str(refused.value) == leads_to.replace("it is", f"job {job} is")
        assert store.get(job).status == state
    else:
        assert ask(store, job).status == leads_to
        assert ask(store, job).status == leads_to, "it may be asked twice"


def test_a_job_that_was_resumed_and_waits_is_cleaned_up_when_it_is_cancelled(store: JobStore) -> None:
    job = in_state(store, "paused")
    resume(store, job)
    assert cancel(store, job).status == "cancelling", "the controller deletes what it left"


def test_a_job_starts_once_however_often_it_goes_on(store: JobStore) -> None:
    job = in_state(store, "paused")
    started_at = store.get(job).started_at
    resume(store, job)
    store.move(job, "running")
    assert started_at
    assert store.get(job).started_at == started_at


def test_a_job_goes_on_where_the_queue_has_room(store: JobStore) -> None:
    job = in_state(store, "paused")
    store.submit(SPEC)
    with pytest.raises(LimitReached, match="a queue of 1"):
        resume(store, job, most_queued=1)
    assert store.get(job).status == "paused"
    assert resume(store, job, most_queued=2).status == "queued"


@pytest.mark.parametrize("ask", [pause, resume, cancel])
def test_another_tenant_s_job_is_not_there(ask: Callable[[JobStore, str], Any], store: JobStore) -> None:
    job = store.seen_by("alice", everything=False).submit(SPEC).id
    with pytest.raises(JobNotFound):
        ask(store.seen_by("bob", everything=False), job)
    assert store.get(job).status == "queued"
