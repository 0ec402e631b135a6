"""Promises of the controller: from any state, a step leads to where things should be."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainfed_ray.cluster.jobs.control import delete, pause, resume
from chainfed_ray.cluster.jobs.controller import Controller
from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.turns import Turns
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.errors import LimitReached
from chainfed_ray.federation.run import in_this_process
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.states import AT_WORK
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job
from tests.builders import MIB, SPEC, fits


class Processes:
    """Coordinators of which only the names are kept.

    The process of a ``stubborn`` one lives on when it is told to end, a ``dying`` one dies at its start, and to end one that
    is ``cursed`` fails.
    """

    def __init__(self, storage: Storage) -> None:
        self.jobs: set[str] = set()
        self.stubborn: set[str] = set()
        self.dying: set[str] = set()
        self.cursed: set[str] = set()
        self.cleared: list[str] = []  # of their copies
        self._storage = storage

    def alive(self) -> set[str]:
        return set(self.jobs)

    def ensure(self, job: str) -> None:
        if job not in self.dying:
            self.jobs.add(job)

    def end(self, job: str) -> bool:
        if job in self.cursed:
            raise RuntimeError(f"{job} is cursed")
        self.jobs.discard(job)
        return job not in self.stubborn

    def clear_copies(self, jobs: Sequence[str]) -> None:
        self.cleared += jobs

    def clear_scratch(self, jobs: Sequence[str]) -> None:
        for job in jobs:
            self._storage.clear_scratch(job)


def a_controller(folder: Path, parallel_jobs: int = 1) -> tuple[Controller, JobStore, Processes, Settings]:
    settings = Settings(Storage.at(folder), parallel_jobs)
    store, processes = JobStore(settings.storage.database), Processes(settings.storage)
    return Controller(settings, store, processes), store, processes, settings


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    made = a_controller(tmp_path)
    yield made
    made[1].close()


def test_jobs_run_in_their_order(parts: tuple[Controller, JobStore, Processes, Settings]) -> None:
    controller, store, processes, _ = parts
    jobs = [store.submit(SPEC).id for _ in range(3)]
    for job in jobs:
        controller.step()
        assert processes.jobs == {job}
        assert [record.id for record in store.page(status="validating")] == [job]
        store.move(job, "running")
        store.move(job, "succeeded" if job != jobs[1] else "failed", result={})
    controller.step()
    assert processes.jobs == set()


@pytest.mark.slow
def test_a_paused_job_has_no_coordinator_and_goes_on_when_its_old_one_has_ended(
    parts: tuple[Controller, JobStore, Processes, Settings],
) -> None:
    controller, store, processes, settings = parts
    job, other = store.submit(SPEC).id, store.submit(SPEC).id
    controller.step()
    settings.storage.scratch(job).mkdir(parents=True)
    store.move(job, "running")
    store.publish(job, "started", "started", {})
    pause(store, job)
    controller.step()
    assert (store.get(job).status, processes.jobs) == ("pausing", {job})
    store.move(job, "paused", before=("pausing",))  # by its coordinator
    controller.step()
    assert processes.jobs == {other}
    assert settings.storage.scratch(job).exists(), "it is of use when the job goes on"
    resume(store, job, fits)
    controller.step()
    assert (store.get(job).status, processes.jobs) == ("queued", {other}), "there is no place"
    processes.jobs.add(job)  # as if its old coordinator were still there
    store.move(other, "running")
    store.move(other, "succeeded", result={})
    controller.step()
    assert (store.get(job).status, processes.jobs) == ("queued", set())
    controller.step()
    assert (store.get(job).status, processes.jobs) == ("running", {job}), "it was validated before"


def test_a_job_whose_coordinator_dies_as_it_pauses_is_paused_when_its_process_is_gone(
    parts: tuple[Controller, JobStore, Processes, Settings],
) -> None:
    controller, store, processes, settings = parts
    job = store.submit(SPEC).id
    controller.step()
    pause(store, job)
    processes.jobs.clear()
    processes.stubborn.add(job)
    controller.step()
    assert store.get(job).status == "pausing"
    processes.jobs.clear()
    processes.stubborn.clear()
    CommitLog(settings.storage.job(job)).secret()
    controller.step()
    assert (store.get(job).status, processes.jobs) == ("paused", set())
    with pytest.raises(LimitReached, match="of jobs"):
        store.kept_bytes.check("default", 1)


def test_a_running_job_gets_its_coordinator_back(parts: tuple[Controller, JobStore, Processes, Settings]) -> None:
    controller, store, processes, _ = parts
    job = store.submit(SPEC).id
    controller.step()
    processes.jobs.clear()  # the loss of the whole cluster
    controller.step()
    assert processes.jobs == {job}


def test_a_cancelled_job_ends_and_gives_its_disk_back(parts: tuple[Controller, JobStore, Processes, Settings]) -> None:
    controller, store, processes, settings = parts
    job, other = store.submit(SPEC).id, store.submit(SPEC).id
    controller.step()
    settings.storage.scratch(job).mkdir(parents=True)
    CommitLog(settings.storage.job(job)).secret()
    (settings.storage.job(job) / "rounds" / "0.json").write_bytes(bytes(1000))
    store.move(job, "cancelling")
    controller.step()
    assert store.get(job).status == "cancelled"
    with pytest.raises(LimitReached, match="of jobs"):
        store.kept_bytes.check("default", 1000)
    assert not settings.storage.scratch(job).exists()
    assert not (settings.storage.job(job) / "privacy.key").exists(), "of noise that is made no more"
    assert processes.jobs == {other}


def test_what_a_cancelled_job_may_make_anew_is_removed_when_its_process_is_gone(
    parts: tuple[Controller, JobStore, Processes, Settings],
) -> None:
    controller, store, processes, settings = parts
    job = store.submit(SPEC).id
    controller.step()
    processes.stubborn.add(job)
    CommitLog(settings.storage.job(job)).secret()
    store.move(job, "cancelling")
    controller.step()
    assert store.get(job).status == "cancelling"
    assert (settings.storage.job(job) / "privacy.key").exists()
    processes.stubborn.clear()
    controller.step()
    assert store.get(job).status == "cancelled"
    assert not (settings.storage.job(job) / "privacy.key").exists()


def test_a_broken_job_folder_stops_nobody_else(parts: tuple[Controller, JobStore, Processes, Settings]) -> None:
    controller, store, processes, settings = parts
    job, other = store.submit(SPEC).id, store.submit(SPEC).id
    controller.step()
    (settings.storage.root / "jobs").mkdir()
    settings.storage.job(job).write_text("a file where a folder is meant")
    store.move(job, "cancelling")
    controller.step()
    broken = store.get(job)
    assert broken.status == "cancelled"
    assert broken.error is not None
    assert broken.error["type"] == "NotADirectoryError"
    assert processes.jobs == {other}


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_a_deleted_job_leaves_nothing(
    parts: tuple[Controller, JobStore, Processes, Settings], broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, store, processes, settings = parts
    job, other = store.submit(SPEC).id, store.submit(SPEC).id
    store.move(job, "cancelled")
    folder = settings.storage.job(job)
    if broken:
        folder.parent.mkdir(parents=True)
        folder.write_text("a file where a folder is meant")
    else:
        CommitLog(folder).secret()
        settings.storage.scratch(job).mkdir(parents=True)
    delete(store, job)
    assert folder.exists()
    processes.stubborn.add(job)
    controller.step()
    assert folder.exists(), "a process of it may still write"
    processes.stubborn.clear()

    def cannot(storage: Storage, job: str) -> None:
        raise PermissionError(13, "not allowed", str(storage.job(job)))

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove", cannot)
        controller.step()
    assert store.deletions.marked(9) == [job], "a later step tries again"
    assert processes.cleared == []
    assert processes.jobs == {other}, "and the others go on"
    controller.step()
    assert not folder.exists()
    assert not settings.storage.scratch(job).exists()
    assert store.deletions.marked(9) == []
    assert processes.cleared == [job], "the copies of what it committed, also on other machines"
    assert [record.id for record in store.page()] == [other]


def test_caches_that_an_earlier_controller_left_are_deleted(tmp_path: Path) -> None:
    _, store, _, settings = a_controller(tmp_path)
    job = store.submit(SPEC).id
    store.move(job, "cancelled")
    settings.storage.scratch(job).mkdir(parents=True)
    controller, again, _, _ = a_controller(tmp_path)
    controller.step()
    assert not settings.storage.scratch(job).exists()
    store.close()
    again.close()


ACTS = st.lists(
    st.sampled_from(["submit", "step", "lose", "cancel", "succeed", "pause", "paused", "resume"]), max_size=20
)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(acts=ACTS, parallel_jobs=st.integers(1, 3))
def test_wherever_things_are_steps_lead_to_where_they_should_be(
    tmp_path_factory: pytest.TempPathFactory, acts: list[str], parallel_jobs: int
) -> None:
    controller, store, processes, _ = a_controller(tmp_path_factory.mktemp("controller"), parallel_jobs)
    for act in acts:
        running = [record.id for record in store.page(status=AT_WORK)]
        match act:
            case "submit":
                store.submit(SPEC)
            case "step":
                controller.step()
            case "lose":
                processes.jobs.clear()
            case "cancel" if running:
                store.move(running[0], "cancelling")
            case "pause" if running:
                pause(store, running[0])
            case "paused" if running:  # its coordinator has stopped, and waits for its end
                store.move(running[0], "paused", before=("pausing",))
            case "resume":
                for job in store.page(status=("pausing", "paused"))[:1]:
                    resume(store, job.id, fits)
            case "succeed" if running:
                store.move(running[-1], "running")
                store.move(running[-1], "succeeded", result={})
    for _ in range(2):  # a job that was resumed starts again when what it had before has ended
        controller.step()
    running = [record.id for record in store.page(status=AT_WORK)]
    waiting = store.queue(100)
    assert processes.jobs == set(running)
    assert not store.page(status="cancelling")
    assert len(running) == parallel_jobs or (len(running) < parallel_jobs and not waiting)
    store.close()


@pytest.mark.slow
def test_a_job_whose_coordinator_dies_at_each_start_fails_and_gives_its_place_to_others(
    parts: tuple[Controller, JobStore, Processes, Settings],
) -> None:
    controller, store, processes, _ = parts
    job, other = store.submit(SPEC).id, store.submit(SPEC).id
    processes.dying.add(job)
    for _ in range(5):
        controller.step()
        assert store.get(job).status == "validating"
    controller.step()
    lost = store.get(job)
    assert (lost.status, lost.error and lost.error["type"]) == ("failed", "CoordinatorLost")
    controller.step()
    assert processes.jobs == {other}


def test_the_loss_of_the_whole_cluster_kills_no_job(tmp_path: Path) -> None:
    """Each time there is another controller, which has seen none of the coordinators that are gone."""
    settings = Settings(Storage.at(tmp_path))
    store = JobStore(settings.storage.database)
    job = store.submit(SPEC).id
    for _ in range(9):
        processes = Processes(settings.storage)
        Controller(settings, store, processes).step()
        assert processes.jobs == {job}
    assert store.get(job).restarts == 0
    store.close()


@pytest.mark.parametrize("state", ["cancelling", "deleted", "paused"])
def test_a_job_that_cannot_be_ended_stops_nobody_else(
    parts: tuple[Controller, JobStore, Processes, Settings], state: str
) -> None:
    controller, store, processes, _ = parts
    job, other = store.submit(SPEC).id, store.submit(SPEC).id
    controller.step()
    store.move(job, "running")
    if state == "deleted":
        store.move(job, "failed")
        delete(store, job)
    else:
        store.move(job, "cancelling" if state == "cancelling" else "pausing")
        store.move(job, "paused", before=("pausing",))
    processes.cursed.add(job)
    controller.step()
    assert processes.jobs == {job, other}


@pytest.mark.slow
def test_a_broken_folder_beside_a_good_job(tmp_path: Path, document: dict[str, Any]) -> None:
    """The broken one fails with its reason, and the good one has its model."""
    settings = Settings(Storage.at(tmp_path / "storage"))
    store, processes = JobStore(settings.storage.database), Processes(settings.storage)
    controller = Controller(settings, store, processes)
    document["rounds"] |= {"total": 1, "clients": 2}
    broken, good = (store.submit(parse_job({**document, "name": name})).id for name in ("broken", "good"))
    (settings.storage.root / "jobs").mkdir()
    settings.storage.job(broken).write_text("a file where a folder is meant")
    for job in (broken, good):
        controller.step()
        assert processes.jobs == {job}
        run_queued_job(job, settings.storage, in_this_process)
    ended = store.get(broken)
    assert (ended.status, ended.error and ended.error["type"]) == ("failed", "FileExistsError")
    assert store.get(good).status == "succeeded"
    assert [record.id for record in store.models()] == [good]
    store.close()


def test_a_tenant_at_its_limit_lets_others_go_first(tmp_path: Path) -> None:
    settings = Settings(Storage.at(tmp_path), parallel_jobs=3, running_jobs=1)
    store, processes = JobStore(settings.storage.database), Processes(settings.storage)
    controller = Controller(settings, store, processes)
    alice, bob = (store.seen_by(tenant, everything=False) for tenant in ("alice", "bob"))
    first, second, third = (alice.submit(SPEC).id for _ in range(3))
    other = bob.submit(SPEC).id
    controller.step()
    assert processes.jobs == {first, other}
    controller.step()
    assert processes.jobs == {first, other}
    store.move(first, "running")
    store.move(first, "succeeded", result={})
    controller.step()
    assert processes.jobs == {second, other}
    assert store.get(third).status == "queued"
    store.close()


def of_memory(memory: str, count: int = 1) -> JobSpec:
    """A job of a client of 10 MiB, and others of so much."""
    fleet = {"clients": [{"name": "a", "memory": "10MiB"}, {"name": "b", "memory": memory, "count": count}]}
    return parse_job(SPEC.document() | {"fleet": fleet, "rounds": {"clients": 2}})


@pytest.fixture
def limited(tmp_path: Path) -> Settings:
    """Settings by which clients of a tenant that train at once have 200 MiB."""
    return Settings(Storage.at(tmp_path), parallel_jobs=3, client_slots=2, client_memory=200 * MIB)


@pytest.mark.slow
def test_a_job_waits_while_the_memory_of_its_tenants_clients_is_in_use(limited: Settings) -> None:
    """The tenant's later jobs wait behind it, and those of others do not."""
    specs = of_memory("60MiB", 9), of_memory("100MiB"), of_memory("20MiB")
    with closing(JobStore(limited.storage.database)) as store:
        processes = Processes(limited.storage)
        first, second, small = (store.submit(spec, reads_anything=False).id for spec in specs)
        other = store.seen_by("other", everything=False).submit(of_memory("190MiB"), reads_anything=False).id
        for _ in range(2):
            Controller(limited, store, processes).step()  # one in place of another says nothing again
        assert processes.jobs == {first, other}
        (waiting,) = store.of_kind(second, "waiting")
        assert "need 110MiB at once" in waiting.data["message"]
        assert "hold 120MiB of the 200MiB that CHAINFED_CLIENT_MEMORY allows" in waiting.data["message"]
        assert store.of_kind(small, "waiting") == []
        store.move(first, "failed")
        Controller(limited, store, processes).step()
        assert processes.jobs == {second, small, other}


@pytest.mark.slow
def test_a_job_that_is_queued_again_says_again_that_it_waits(limited: Settings) -> None:
    with closing(JobStore(limited.storage.database)) as store:
        controller = Controller(limited, store, Processes(limited.storage))
        _, job = (store.submit(of_memory("100MiB"), reads_anything=False).id for _ in range(2))
        for times in (1, 2):
            for _ in range(2):
                controller.step()
            assert len(store.of_kind(job, "waiting")) == times
            pause(store, job)
            resume(store, job, fits)  # before the controller sees it


@pytest.mark.slow
def test_a_job_that_never_fits_any_more_fails_and_holds_up_no_later_one(limited: Settings) -> None:
    """They came before the limit was lowered. A job without a key has no limit."""
    with closing(JobStore(limited.storage.database)) as store:
        processes = Processes(limited.storage)
        new, begun, small = (
            store.submit(of_memory(memory), reads_anything=False).id for memory in ("300MiB", "250MiB", "20MiB")
        )
        free = store.seen_by("free", everything=False).submit(of_memory("300MiB")).id
        store.publish(begun, "started", "started", {})
        controller = Controller(limited, store, processes)
        for _ in range(2):
            controller.step()
        assert processes.jobs == {small, free}
        for job, needed in ((new, "310MiB"), (begun, "260MiB")):
            failed = store.get(job)
            assert failed.status == "failed"
            assert failed.error is not None
            assert failed.error["type"] == "InvalidJob"
            assert f"'{needed}'; expected at most 200MiB" in failed.error["message"]


def test_a_job_that_is_gone_at_its_turn_ends_no_controller(limited: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(JobStore(limited.storage.database)) as store:
        processes = Processes(limited.storage)
        job = store.submit(of_memory("20MiB"), reads_anything=False).id
        other = store.seen_by("other", everything=False).submit(of_memory("20MiB"), reads_anything=False).id
        found = Turns.next

        def and_delete(turns: Turns, *arguments: Any, **more: Any) -> tuple[str, str] | None:
            if (turn := found(turns, *arguments, **more)) and turn[0] == job:
                store.move(job, "cancelled")
                delete(store, job)
            return turn

        monkeypatch.setattr(Turns, "next", and_delete)
        Controller(limited, store, processes).step()
        assert processes.jobs == {other}
