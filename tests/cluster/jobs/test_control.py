"""Promises of what people ask of a job: it gets there, or they hear why not; one that goes on has the bits of any other."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from chainfed_ray.activity import Note
from chainfed_ray.api.jobs.conditions import CHANGES, conditions
from chainfed_ray.client.messages import Client, Training, TurnOrder
from chainfed_ray.client.pool import ClientPool, LocalPool, MakePool
from chainfed_ray.cluster.jobs import control
from chainfed_ray.cluster.jobs.control import cancel, delete, pause
from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.deletions import Deletions
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import JobConflict, JobNotFound, LimitReached, PreconditionFailed
from chainfed_ray.federation.run import in_this_process
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.model.source import ModelSource
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.states import Status
from chainfed_ray.spec.parse import parse_job
from tests.builders import PRIVACY, SPEC, a_job, assert_same, fits, run
from tests.pools import Altered, Answer, Killed, dying

ROUNDS, CLIENTS = 4, 3
resume, retry = partial(control.resume, check_fits=fits), partial(control.retry, check_fits=fits)


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


@pytest.mark.slow
def test_a_job_that_pauses_after_any_round_ends_with_the_same_bits(
    document: dict[str, Any], expected: Any, storage: Storage, store: JobStore
) -> None:
    job = store.submit(parse_job(document)).id
    for done in range(ROUNDS):
        store.move(job, "running" if done else "validating")
        run_queued_job(job, storage, asking(lambda: pause(store, job), turns=1))
        found = store.get(job)
        assert (found.status, found.activity) == ("paused", None)
        with pytest.raises(LimitReached, match="iB of jobs"):
            store.kept_bytes.check("default", 1)
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


@pytest.mark.slow
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


def in_state(store: JobStore, state: Status, was_validated: bool = True) -> str:
    """A job that got to ``state`` by itself and by what was asked of it."""
    job = store.submit(SPEC).id
    if was_validated:
        store.publish(job, "started", "started", {})
    ways: dict[Status, tuple[Status, ...]] = {
        "queued": (), "validating": (), "paused": ("running", "pausing"), "cancelled": (),
    }  # fmt: skip
    for before in ways.get(state, ("running",)):
        assert store.move(job, before)
    assert store.get(job).status == state or store.move(job, state)
    return job


@pytest.mark.slow
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
        (retry, "failed", "queued"),
        (retry, "cancelled", "queued"),
        (retry, "running", "running"),
        (retry, "paused", "it is paused; it cannot be tried again"),
        (retry, "succeeded", "it is succeeded; it cannot be tried again"),
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


def test_a_job_that_is_resumed_before_it_was_validated_is_validated(store: JobStore) -> None:
    job = in_state(store, "validating", was_validated=False)
    for _ in range(2):
        assert [ask(store, job).status for ask in (pause, resume, resume)] == ["pausing", "validating", "validating"]
    store.move(job, "failed", error={"type": "InvalidJob", "message": "no"})
    found = {one.type: (one.status, one.reason) for one in conditions(store.of_kind(job, *CHANGES))}
    assert (found["Validated"], found["Finished"]) == (("False", "InvalidJob"), ("True", "InvalidJob"))


@pytest.mark.slow
def test_a_job_that_is_resumed_by_who_had_not_seen_its_start_runs(
    document: dict[str, Any], storage: Storage, store: JobStore
) -> None:
    document["rounds"] |= {"total": 1, "clients": 1}
    job = store.submit(parse_job(document)).id
    store.move(job, "validating")

    def late() -> None:
        store.move(job, "pausing")
        store.move(job, "validating", before=("pausing",))

    run_queued_job(job, storage, asking(late, turns=0))
    assert [event.kind for event in store.events(job)][-3:] == ["running", "finished", "succeeded"], (
        "it says so at once"
    )


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


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["failed", "cancelled"])
def test_a_job_that_is_tried_again_goes_on_from_its_last_commit(
    ends: Status, document: dict[str, Any], expected: Any, storage: Storage, store: JobStore
) -> None:
    job = store.submit(parse_job(document)).id
    store.move(job, "running")
    with pytest.raises(Killed):
        run_queued_job(job, storage, lambda source, note: dying(LocalPool(source), 2 * CLIENTS))
    for _ in range(3):
        store.count_restart(job)
    if ends == "cancelled":
        store.move(job, "cancelling")
    store.move(job, ends, error={"type": "ValueError", "message": "no"})
    assert len(CommitLog(storage.job(job)).rounds()) == 2
    again = retry(store, job)
    assert (again.status, again.error, again.finished_at, again.restarts) == ("queued", None, None, 0)
    store.move(job, "running")
    run_queued_job(job, storage, in_this_process)
    assert store.get(job).status == "succeeded"
    assert_same(load_stack(storage.model(job)).stack.tensors(), expected)
    kinds = [event.kind for event in store.events(job)]
    assert kinds.count("round") == ROUNDS, "each round is told once"
    assert [kind for kind in kinds if kind in (ends, "succeeded")] == [ends, "succeeded"]


def test_a_job_with_noise_is_not_tried_again_once_it_had_a_round(store: JobStore) -> None:
    """Its secret is erased, and what is drawn with another one would weaken its privacy."""
    document = SPEC.document()
    document |= {"privacy": PRIVACY, "chain": document["chain"] | {"start": 1, "head": "zero"}}
    jobs = [store.submit(parse_job(document)).id for _ in range(2)]
    store.publish(jobs[0], "round-0", "round", {})
    for job in jobs:
        store.move(job, "cancelled")
    with pytest.raises(JobConflict, match="the secret of its noise was erased"):
        retry(store, jobs[0])
    assert store.get(jobs[0]).status == "cancelled"
    assert retry(store, jobs[1]).status == "queued"


@pytest.mark.slow
def test_a_job_with_noise_that_was_killed_between_a_commit_and_its_event_draws_no_noise_twice(
    document: dict[str, Any], storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    document |= {"privacy": PRIVACY, "chain": document["chain"] | {"start": 1, "head": "zero"}}
    document["rounds"] |= {"total": 2}
    job = store.submit(parse_job(document)).id
    store.move(job, "running")
    publish = JobStore.publish

    def dies(self: JobStore, job: str, key: str, kind: str, data: dict[str, Any]) -> None:
        if kind == "round":
            raise Killed
        publish(self, job, key, kind, data)

    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "publish", dies)
        with pytest.raises(Killed):
            run_queued_job(job, storage, in_this_process)
    log = CommitLog(storage.job(job))
    (committed,), tensors, secret = log.rounds(), log.tensors(0), log.secret()
    assert store.newest(job, "round") is None

    # It is cancelled now: its secret is erased, and it cannot be tried again.
    other = store.submit(parse_job(document)).id
    store.move(other, "cancelled")
    with pytest.raises(JobConflict, match="the secret of its noise was erased"):
        retry(store, other, folder_of=lambda _: storage.job(job))
    assert store.get(other).status == "cancelled"
    assert retry(store, other, folder_of=storage.job).status == "queued", "it has no round"

    # Or it goes on: the round stands, with its noise, and is told once.
    seen = list[Any]()
    run_queued_job(job, storage, asking(lambda: seen.extend([log.secret(), log.tensors(0)]), turns=0))
    assert store.get(job).status == "succeeded"
    assert seen[0] == secret
    assert_same(seen[1], tensors)
    told = [event.data for event in store.events(job) if event.kind == "round"]
    assert [one["index"] for one in told] == [0, 1]
    assert told[0] == committed.model_dump(mode="json")


@pytest.fixture
def any_store(database: str) -> Iterator[JobStore]:
    """A store of each kind of database."""
    made = JobStore(database)
    yield made
    made.close()


def served(store: JobStore, key: str | None = "key") -> str:
    job = store.submit(SPEC, key).id
    store.move(job, "running")
    store.publish(job, "round-0", "round", {"index": 0})
    store.move(job, "succeeded", result={})
    return job


def test_a_job_that_is_deleted_is_not_there_and_neither_is_its_model(store: JobStore) -> None:
    job, older = served(store), store.submit(SPEC).id
    with pytest.raises(JobConflict, match="is queued; it cannot be deleted"):
        delete(store, older)
    delete(store, job)
    for ask in (store.get, store.events, lambda job: retry(store, job), lambda job: delete(store, job)):
        with pytest.raises(JobNotFound):
            ask(job)
    assert [found.id for found in store.page()] == [older]
    assert store.counts() == {"default": {"queued": 1}}
    assert not store.move(job, "queued")
    name = SPEC.model_name
    assert (store.models(), store.model(name), store.of_model(name), store.bases(), store.model_names(9)) == (
        [],
        None,
        [],
        [],
        [],
    )
    assert store.on_base(name.partition(":")[0], 9) == []
    assert store.submit(SPEC, "key").id != job, "the key of its submission is free"
    assert store.deletions.marked(9) == [job]
    store.deletions.purge(older)
    store.deletions.purge(job)
    assert (store.deletions.marked(9), len(store.page())) == ([], 2)


def test_a_model_that_an_alias_stands_for_is_kept(store: JobStore) -> None:
    alice = store.seen_by("alice", everything=False)
    old, new = served(alice), alice.submit(SPEC).id
    store.move(new, "running")
    store.publish(new, "round-0", "round", {"index": 0})
    store.move(new, "succeeded", result={})
    for name in (SPEC.model_name, f"{SPEC.model_name}@best"):
        alice.aliases.set("support", {name: 1.0})
        with pytest.raises(JobConflict, match="the alias alice/support stands for its model"):
            delete(store, new)
    with pytest.raises(JobConflict, match="the alias support stands for its model"):
        delete(alice, new)
    delete(store, old)  # which the name does not mean any more
    alice.aliases.set("support", {SPEC.model_name.partition(":")[0]: 1.0})
    with pytest.raises(JobConflict, match="the alias alice/support stands for its model"):
        delete(store, new)  # the last job on that base model
    alice.aliases.delete("support")
    delete(alice, new)
    assert store.page() == []


@pytest.mark.parametrize("ask", [pause, resume, cancel, retry, delete])
def test_another_tenant_s_job_is_not_there(ask: Callable[[JobStore, str], Any], store: JobStore) -> None:
    job = store.seen_by("alice", everything=False).submit(SPEC).id
    with pytest.raises(JobNotFound):
        ask(store.seen_by("bob", everything=False), job)
    assert store.get(job).status == "queued"


@pytest.mark.parametrize(
    ("ask", "states"),
    [
        (pause, ("running",)),
        (resume, ("running", "pausing")),
        (resume, ("paused",)),
        (cancel, ("running",)),
        (retry, ("cancelled",)),
        (delete, ("cancelled",)),
        (pause, ("paused",)),
    ],
)
def test_a_job_that_has_changed_since_it_was_looked_at_stays_as_it_is(
    ask: Callable[[JobStore, str], Any], states: tuple[Status, ...], any_store: JobStore
) -> None:
    store, job = any_store, any_store.submit(SPEC).id
    earlier = store.revision(job)
    for state in states:
        assert store.move(job, state)
    before, now = store.events(job), store.revision(job)
    assert now != earlier
    with pytest.raises(PreconditionFailed, match=job):
        ask(store.at([earlier]), job)
    assert store.events(job) == before
    store.publish(job, "round-0", "round", {"index": 0})
    ask(store.at([earlier, now]), job)


def test_a_revision_is_of_one_job_and_of_one_history(
    any_store: JobStore, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chainfed_ray.cluster.jobs.store.moment", lambda: "2026-10-01T00:00:00.000Z")
    first, second = (any_store.submit(SPEC).id for _ in range(2))
    assert any_store.revision(first) != any_store.revision(second), "both were queued at once"
    monkeypatch.undo()
    any_store.move(first, "paused")
    lost = any_store.revision(first)
    engine = create_engine(database)
    with engine.begin() as connection:  # as a restore of a backup from before the pause
        connection.execute(text("delete from events where kind = 'paused'"))
        connection.execute(text("update jobs set status = 'queued'"))
    engine.dispose()
    monkeypatch.setattr("chainfed_ray.cluster.jobs.store.moment", lambda: "2027-10-01T00:00:00.000Z")
    any_store.move(first, "cancelled")
    assert len(any_store.events(first)) == 2
    with pytest.raises(PreconditionFailed):
        delete(any_store.at([lost]), first)


def test_what_was_done_is_no_conflict_if_another_undoes_it_at_once(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, move = store.submit(SPEC).id, JobStore.move
    later = [lambda: resume(store, job)]

    def before_another(self: JobStore, *given: Any, **named: Any) -> bool:
        done = move(self, *given, **named)
        while done and later:
            later.pop()()
        return done

    monkeypatch.setattr(JobStore, "move", before_another)
    assert pause(store, job).status == "queued"
    assert [event.kind for event in store.events(job)] == ["queued", "paused", "queued"]


def test_a_queue_has_as_many_jobs_as_it_may_also_if_all_come_at_once(any_store: JobStore) -> None:
    most, paused = 3, [any_store.submit(SPEC).id for _ in range(8)]
    for job in paused:
        any_store.move(job, "paused")
    all_at_once = Barrier(8)

    def resumed(job: str) -> bool:
        all_at_once.wait(10)
        with suppress(LimitReached):
            return resume(any_store, job, most_queued=most).status == "queued"
        return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(resumed, paused)) == most
    alice = any_store.seen_by("alice", everything=False)

    def submitted(_: int) -> bool:
        all_at_once.wait(10)
        with suppress(LimitReached):
            return alice.submit(SPEC, most_queued=most).status == "queued"
        return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(submitted, range(8))) == most
    assert any_store.counts() == {"alice": {"queued": most}, "default": {"paused": 8 - most, "queued": most}}


@pytest.mark.slow
@pytest.mark.parametrize("base", [False, True], ids=["model", "base"])
def test_no_alias_stands_for_nothing_whoever_comes_first(any_store: JobStore, base: bool) -> None:
    """One deletes a job while another lets an alias stand for its model: one of them is refused."""
    store, name = any_store, SPEC.model_name.partition(":")[0] if base else SPEC.model_name
    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            job, both = served(store), Barrier(2)

            def named(job: str = job, both: Barrier = both) -> bool:
                both.wait(10)
                with suppress(JobNotFound):
                    store.aliases.set("support", {name: 1.0}, [job])
                    return True
                return False

            def deleted(job: str = job, both: Barrier = both) -> bool:
                both.wait(10)
                with suppress(JobConflict):
                    delete(store, job)
                    return True
                return False

            done = [threads.submit(what) for what in (named, deleted)]
            is_named, is_deleted = (one.result(30) for one in done)
            assert is_named != is_deleted
            assert store.aliases.delete("support") == is_named
            if not is_deleted:
                delete(store, job)


def test_an_alias_of_a_job_that_is_deleted_meanwhile_is_refused(store: JobStore) -> None:
    job = served(store)
    delete(store, job)
    with pytest.raises(JobNotFound):
        store.aliases.set("support", {SPEC.model_name: 1.0}, [job])
    assert store.aliases.all() == {}


def before_a_mark(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let ``act`` happen once, between what the next deletion looks at and the mark that it makes."""
    later, mark = [act], Deletions.mark

    def after_another(self: Deletions, *given: Any) -> bool:
        while later:
            later.pop()()
        return mark(self, *given)

    monkeypatch.setattr(Deletions, "mark", after_another)


def test_an_alias_that_is_made_while_its_job_is_deleted_keeps_the_job(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = served(store)
    before_a_mark(monkeypatch, lambda: store.aliases.set("support", {SPEC.model_name: 1.0}, [job]))
    with pytest.raises(JobConflict, match="the alias support stands for its model"):
        delete(store, job)
    assert store.model(SPEC.model_name)


def test_a_job_that_may_fail_takes_no_place_of_the_last_one_on_a_base_model_with_an_alias(store: JobStore) -> None:
    first, second = served(store), store.submit(SPEC).id
    store.move(second, "running")
    store.aliases.set("support", {SPEC.model_name.partition(":")[0]: 1.0}, [first])
    with pytest.raises(JobConflict, match="the alias support stands for its model"):
        delete(store, first)
    store.move(second, "succeeded", result={})
    delete(store, first)
    assert [job.id for job in store.page()] == [second]


def test_a_job_whose_document_cannot_be_read_is_deleted_whatever_its_base_model(
    any_store: JobStore, database: str
) -> None:
    store, job = any_store, served(any_store)
    store.aliases.set("support", {SPEC.model_name.partition(":")[0]: 1.0}, [job])
    engine = create_engine(database)
    with engine.begin() as connection:
        connection.execute(text("update jobs set spec = '[1]'"))
    engine.dispose()
    delete(store, job)
    assert store.page() == []


def test_of_the_last_two_jobs_on_a_base_model_with_an_alias_one_stays(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = served(store), served(store, None)
    training = store.submit(SPEC).id  # which may fail
    store.move(training, "running")
    store.aliases.set("support", {SPEC.model_name.partition(":")[0]: 1.0}, [first])
    before_a_mark(monkeypatch, lambda: delete(store, second))
    with pytest.raises(JobConflict, match="the alias support stands for its model"):
        delete(store, first)
    assert [job.id for job in store.page()] == [training, first]
