"""Promises of the job store: a state changes once, an event is told once, and nothing is lost between processes."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from chainfed_ray.activity import Activity
from chainfed_ray.cluster.jobs.control import delete
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.pages import Place
from chainfed_ray.cluster.schema import migrate
from chainfed_ray.errors import InvalidSetting, JobConflict, JobNotFound, LimitReached
from chainfed_ray.records.states import FINISHED, STATES_BEFORE, Status
from chainfed_ray.spec.parse import parse_job
from tests.builders import SPEC


@pytest.fixture
def store(database: str) -> Iterator[JobStore]:
    made = JobStore(database)
    yield made
    made.close()


@pytest.mark.slow
def test_a_job_from_queue_to_model(store: JobStore) -> None:
    job = store.submit(SPEC)
    assert store.get(job.id) == job
    assert (job.status, job.model, job.spec) == ("queued", "minilm:tiny", SPEC.document())
    assert store.queue(5) == [job]
    assert store.move(job.id, "validating")
    assert store.move(job.id, "running")
    store.publish(job.id, "round-0", "round", {"index": 0})
    assert store.move(job.id, "succeeded", result={"accuracy": 0.5})
    done = store.get(job.id)
    assert (done.status, done.result) == ("succeeded", {"accuracy": 0.5})
    assert done.submitted_at <= (done.started_at or "") <= (done.finished_at or "")
    assert [(event.seq, event.kind) for event in store.events(job.id)] == [
        (1, "queued"), (2, "validating"), (3, "running"), (4, "round"), (5, "succeeded"),
    ]  # fmt: skip
    assert store.queue(5) == []


MOVES = st.lists(st.sampled_from(sorted(STATES_BEFORE)), max_size=12)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(moves=MOVES)
def test_a_finished_job_stays_as_it_is(tmp_path_factory: pytest.TempPathFactory, moves: list[Status]) -> None:
    store = JobStore(f"sqlite:///{tmp_path_factory.mktemp('store') / 'jobs.db'}")
    job = store.submit(SPEC).id
    for to in moves:
        before = store.get(job)
        moved = store.move(job, to)
        assert moved == (before.status in STATES_BEFORE[to])
        assert not (moved and before.status == "succeeded"), "it is final"
        assert not (moved and before.status in FINISHED and to != "queued"), "unless it is tried again"
        assert store.get(job).status == (to if moved else before.status)
    kinds = [event.kind for event in store.events(job)]
    assert kinds[-1] == store.get(job).status
    assert [event.seq for event in store.events(job)] == list(range(1, len(kinds) + 1))
    store.close()


def test_what_a_job_is_busy_with_is_on_its_record_while_it_runs(store: JobStore) -> None:
    job, activity = store.submit(SPEC).id, Activity(what="fitting the head", done=3, total=12, unit="clients")
    store.note_activity(job, activity)
    assert store.get(job).activity is None, "it waits"
    store.move(job, "running")
    for done in (3, 4):
        store.note_activity(job, activity.model_copy(update={"done": done}))
        found = store.get(job).activity
        assert found is not None
        assert found == store.latest([job])[job].activity
        assert Activity.model_validate(found) == activity.model_copy(update={"done": done})
    store.move(job, "cancelling")
    assert (store.get(job).activity, store.latest([job])[job].activity) == (None, None)
    store.move(job, "cancelled")
    store.note_activity(job, activity)  # by a process that has not heard of it yet
    assert (store.get(job).activity, store.latest([job])[job].activity) == (None, None)
    assert [event.kind for event in store.events(job)] == ["queued", "running", "cancelling", "cancelled"]


@pytest.mark.slow
def test_processes_that_start_at_the_same_moment_share_a_database(database: str) -> None:
    def use(_: int) -> str:
        store = JobStore(database)
        job = store.submit(SPEC).id
        store.close()
        return job

    with ThreadPoolExecutor(4) as threads:
        jobs = set(threads.map(use, range(4)))
    store = JobStore(database)
    assert {job.id for job in store.page()} == jobs
    store.close()


@pytest.mark.slow
def test_an_event_is_told_once_whoever_tells_it(store: JobStore, database: str) -> None:
    job = store.submit(SPEC).id

    def tell(_: int) -> None:
        mine = JobStore(database)
        for index in range(10):
            mine.publish(job, f"round-{index}", "round", {"index": index})
        mine.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(tell, range(4)))
    told = store.events(job, after=1)
    assert [event.seq for event in told] == list(range(2, 12))
    assert sorted(event.data["index"] for event in told) == list(range(10))


@pytest.mark.slow
def test_an_event_of_a_job_that_is_deleted_is_dropped(store: JobStore) -> None:
    """Who publishes it has not heard of that yet."""
    job, other = (store.submit(SPEC).id for _ in range(2))
    store.move(job, "cancelled")
    delete(store, job)
    for leave in (lambda: None, lambda: store.deletions.purge(job)):
        leave()
        store.publish(job, "round-0", "round", {"index": 0})
        assert store.latest([job]) == {}
        assert store.of_kind(job, "round") == []
    assert store.count_restart(job) == 0
    assert [event.kind for event in store.events(other)] == ["queued"]


@pytest.mark.slow
def test_events_and_the_deletion_of_their_job_do_not_meet(store: JobStore, database: str) -> None:
    jobs = [store.submit(SPEC).id for _ in range(8)]
    for job in jobs:
        store.move(job, "cancelled")

    def publish(number: int) -> None:
        with closing(JobStore(database)) as mine:
            for index in range(64):
                mine.publish(jobs[index // 8], f"round-{number}-{index}", "round", {})
                mine.note_activity(jobs[index // 8], Activity(what="training"))

    def remove(_: int) -> None:
        with closing(JobStore(database)) as mine:
            for job in jobs:
                with suppress(JobNotFound, JobConflict):  # the other one was faster
                    delete(mine, job)
                for marked in mine.deletions.marked(9):
                    mine.deletions.purge(marked)

    with ThreadPoolExecutor(5) as threads:
        done = [threads.submit(publish, number) for number in range(3)] + [threads.submit(remove, 0) for _ in "ab"]
        for one in done:
            one.result()
    assert (store.page(), store.deletions.marked(9), store.latest(jobs)) == ([], [], {})


@pytest.mark.slow
def test_one_of_many_moves_counts(store: JobStore) -> None:
    job = store.submit(SPEC).id
    with ThreadPoolExecutor(8) as threads:
        moved = list(threads.map(lambda _: store.move(job, "running"), range(8)))
    assert moved.count(True) == 1


def test_restarts_count_until_a_new_round(store: JobStore) -> None:
    job = store.submit(SPEC).id
    assert [store.count_restart(job) for _ in range(3)] == [1, 2, 3]
    store.publish(job, "round-0", "round", {})
    assert store.count_restart(job) == 1
    store.publish(job, "round-0", "round", {})  # the same round told again is no progress
    assert store.count_restart(job) == 2


@pytest.mark.slow
def test_several_at_once_bring_a_database_of_before_forward(database: str) -> None:
    store = JobStore(database)
    job = store.submit(SPEC)
    store.close()
    engine = create_engine(database)
    migrate(engine, "0001")
    engine.dispose()
    before = replace(job, version=1)
    with ThreadPoolExecutor() as several:
        for store in several.map(JobStore, [database] * 4):
            assert store.get(job.id) == before
            assert store.seen_by("default", everything=False).page() == [before]
            assert store.seen_by("other", everything=False).page() == []
            store.close()


def test_a_retry_of_a_submission_makes_no_second_job(store: JobStore) -> None:
    job = store.submit(SPEC, "key")
    assert store.submit(SPEC, "key") == job
    with pytest.raises(JobConflict, match="another specification"):
        store.submit(parse_job({**SPEC.document(), "seed": 1}), "key")
    assert len(store.page()) == 1


def test_pages_and_models(store: JobStore) -> None:
    jobs = [store.submit(SPEC).id for _ in range(5)]
    assert [job.id for job in store.page(2)] == jobs[:2:-1]
    assert [job.id for job in store.page(9, Place.after(store.get(jobs[3])))] == jobs[2::-1]
    for job in jobs[1:3]:
        store.move(job, "running")
        store.move(job, "succeeded", result={})
    assert [job.id for job in store.models()] == [jobs[2]]
    assert [job.id for job in store.page(status="succeeded")] == [jobs[2], jobs[1]]


def test_a_page_of_models_is_full_though_a_document_before_cannot_be_read(store: JobStore, database: str) -> None:
    for name in ("a", "b", "c"):
        job = store.submit(parse_job(SPEC.document() | {"name": name})).id
        store.move(job, "running")
        store.move(job, "succeeded", result={})
    engine = create_engine(database)
    with engine.begin() as connection:
        connection.execute(text("update jobs set spec = '[]' where name = 'a'"))
    engine.dispose()
    assert [job.name for job in store.models(limit=1)] == ["b"]
    assert [job.name for job in store.models(limit=2)] == ["b", "c"]
    assert [job.name for job in store.models()] == ["b", "c"]


def test_what_is_not_there_and_what_is_no_database(store: JobStore) -> None:
    for ask in (lambda: store.get("x"), lambda: store.events("x")):
        with pytest.raises(JobNotFound, match="'x'"):
            ask()
    for look in (store.get, store.revision):  # PostgreSQL takes no such text
        with pytest.raises(JobNotFound):
            look("a\0b")
    with pytest.raises(InvalidSetting, match="CHAINFED_DATABASE") as caught:
        JobStore("nosuch://user:secret@host/jobs")
    assert "secret" not in str(caught.value)


def test_a_database_file_that_is_removed_gets_no_more_jobs(tmp_path: Path) -> None:
    file = tmp_path / "jobs.db"
    store = JobStore(f"sqlite:///{file}")
    assert file.stat().st_mode & 0o077 == 0, "job files may name what is private"
    store.submit(SPEC)
    file.rename(tmp_path / "away.db")
    for ask in (store.check, lambda: store.submit(SPEC)):
        with pytest.raises(OperationalError):
            ask()
    with pytest.raises(OperationalError):
        JobStore(f"sqlite:///{file}", existing=True)
    assert not file.exists(), "an empty one in its place would hide the loss"
    (tmp_path / "away.db").rename(file)
    store.submit(SPEC)
    assert len(store.page()) == 2
    store.close()


def test_the_file_of_a_new_database_is_its_owners_alone(tmp_path: Path) -> None:
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    store.submit(SPEC)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    store.close()


def test_the_newest_model_by_its_name(store: JobStore) -> None:
    jobs = [store.submit(SPEC).id for _ in range(3)]
    assert store.model(SPEC.model_name) is None
    for job in jobs[:2]:
        store.move(job, "running")
        store.move(job, "succeeded", result={})
    found = store.model(SPEC.model_name)
    assert found is not None
    assert found.id == jobs[1]
    assert store.model_names(5) == [SPEC.model_name]
    assert store.model("a\0b") is None


@pytest.mark.slow
def test_tenants_have_jobs_models_and_aliases_of_their_own(store: JobStore) -> None:
    alice, bob, default = (store.seen_by(tenant, everything=False) for tenant in ("alice", "bob", "default"))
    jobs = {}
    for name, part in (("alice", alice), ("bob", bob), ("default", default)):
        jobs[name] = part.submit(SPEC, "key").id
        store.move(jobs[name], "running")
        store.move(jobs[name], "succeeded", result={})
        part.aliases.set("mine", {SPEC.model_name: 1.0})
    assert len(set(jobs.values())) == 3, "a key of one is not another's"
    for name, part in (("alice", alice), ("bob", bob), ("default", default)):
        assert [job.id for job in part.page()] == [jobs[name]]
        assert part.counts() == {name: {"succeeded": 1}}
        assert [line.id for line in part.lines()] == [jobs[name]]
        assert part.model_names(9) == [SPEC.model_name]
        assert [job.id for job in (*part.models(), *part.bases())] == [jobs[name]] * 2
        assert [job.id for job in part.of_model(f"{name}/{SPEC.model_name}")] == [jobs[name]]
        assert part.aliases.all() == {"mine": {SPEC.model_name: 1.0}}
        for other in jobs.keys() - {name}:
            assert part.model(f"{other}/{SPEC.model_name}") is None
            assert part.on_base(f"{other}/minilm", 9) == []
            assert part.aliases.get(f"{other}/mine") is None
            assert not part.aliases.delete(f"{other}/mine")
            assert part.aliases.roll_back(f"{other}/mine", lambda _: True) is None
            for ask in (part.get, part.events):
                with pytest.raises(JobNotFound):
                    ask(jobs[other])
    everything = store.seen_by("ops", everything=True)
    assert everything.model_names(9) == [f"{name}/{SPEC.model_name}" for name in ("alice", "bob", "default")]
    assert sorted(everything.aliases.all()) == ["alice/mine", "bob/mine", "default/mine"]
    assert list(everything.counts()) == ["alice", "bob", "default"]
    assert store.model_names(9) == [f"alice/{SPEC.model_name}", f"bob/{SPEC.model_name}", SPEC.model_name]
    assert everything.aliases.delete("default/mine")
    assert default.aliases.all() == {}


@pytest.mark.slow
def test_counts_that_are_kept_are_those_that_a_count_gives(store: JobStore) -> None:
    moves: tuple[tuple[Status, ...], ...] = (
        (), ("running",), ("running", "pausing"), ("running", "pausing", "running"), ("paused", "queued"), ("cancelled",),
        ("running", "failed", "queued", "running"), ("cancelled",), ("validating", "cancelling"),
    )  # fmt: skip
    for tenant in ("alice", "bob"):
        for states in moves:
            job = store.seen_by(tenant, everything=False).submit(SPEC).id
            assert all(store.move(job, state) for state in states)
        assert store.move(job, "cancelled")
        delete(store, job)
    store.deletions.purge(job)
    counted: dict[str, Counter[Status]] = {"alice": Counter(), "bob": Counter()}
    for record in store.page():
        counted[record.tenant][record.status] += 1
    assert store.counts() == counted
    assert counted["alice"].total() == len(moves) - 1


@pytest.mark.slow
def test_a_tenant_whose_bytes_are_full_queues_no_job(store: JobStore) -> None:
    """It is looked at in the transaction that makes the job: nothing of a refused one is there, and the key of it is free."""
    alice, bob = (store.seen_by(tenant, everything=False) for tenant in ("alice", "bob"))
    first = alice.submit(SPEC, "key", most_stored=1).id
    store.kept_bytes.note(first, 1)
    for key in (None, "more"):
        with pytest.raises(
            LimitReached, match="alice has 0B of uploads and 1B of jobs, as many as CHAINFED_STORED_BYTES"
        ):
            alice.submit(SPEC, key, most_stored=1)
    assert alice.submit(SPEC, "key", most_stored=1).id == first, "it makes no job"
    assert (len(store.page()), alice.counts()) == (1, {"alice": {"queued": 1}})
    bob.submit(SPEC, most_stored=1)
    store.kept_bytes.note(first, 0)
    alice.submit(SPEC, "more", most_stored=1)


@pytest.mark.slow
def test_a_queue_has_so_many_jobs_of_a_tenant(store: JobStore) -> None:
    alice, bob = (store.seen_by(tenant, everything=False) for tenant in ("alice", "bob"))
    first = alice.submit(SPEC, "key", most_queued=1).id
    with pytest.raises(
        LimitReached, match="alice has a queue of 1 with its paused jobs, as many as CHAINFED_QUEUED_JOBS allows"
    ):
        alice.submit(SPEC, most_queued=1)
    assert alice.submit(SPEC, "key", most_queued=1).id == first
    other = bob.submit(SPEC, most_queued=1).id
    assert [job.id for job in store.queue(9)] == [first, other]
    assert len(store.page()) == 2
    store.move(first, "paused")
    with pytest.raises(LimitReached):
        alice.submit(SPEC, most_queued=1)  # a pause makes no room
    more = alice.submit(SPEC, most_queued=2).id
    store.move(more, "paused")
    assert store.move(first, "queued", before=("paused",), most_queued=1), (
        "it goes on beside another one that is paused"
    )
    with pytest.raises(LimitReached):
        store.move(more, "queued", before=("paused",), most_queued=1)
    assert store.get(more).status == "paused"
