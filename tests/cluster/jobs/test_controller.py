"""Promises of the controller: from any state, a step leads to where things should be."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainfed_ray.cluster.jobs.controller import Controller
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.records.commit_log import CommitLog
from tests.builders import SPEC


class Processes:
    """Coordinators of which only the names are kept."""

    def __init__(self) -> None:
        self.jobs: set[str] = set()

    def alive(self) -> set[str]:
        return set(self.jobs)

    def ensure(self, job: str) -> None:
        self.jobs.add(job)

    def end(self, job: str) -> None:
        self.jobs.discard(job)


def a_controller(folder: Path, parallel_jobs: int = 1) -> tuple[Controller, JobStore, Processes, Settings]:
    settings = Settings(Storage.at(folder), parallel_jobs)
    store, processes = JobStore(settings.storage.database), Processes()
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
        assert [record.id for record in store.page(status="running")] == [job]
        store.move(job, "succeeded" if job != jobs[1] else "failed", result={})
    controller.step()
    assert processes.jobs == set()


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
    store.move(job, "cancelling")
    controller.step()
    assert store.get(job).status == "cancelled"
    assert not settings.storage.scratch(job).exists()
    assert not (settings.storage.job(job) / "privacy.key").exists(), "of noise that is made no more"
    assert processes.jobs == {other}


ACTS = st.lists(st.sampled_from(["submit", "step", "lose", "cancel", "succeed"]), max_size=14)


@settings(deadline=None, max_examples=30)
@given(acts=ACTS, parallel_jobs=st.integers(1, 3))
def test_wherever_things_are_steps_lead_to_where_they_should_be(
    tmp_path_factory: pytest.TempPathFactory, acts: list[str], parallel_jobs: int
) -> None:
    controller, store, processes, _ = a_controller(tmp_path_factory.mktemp("controller"), parallel_jobs)
    for act in acts:
        running = [record.id for record in store.page(status="running")]
        match act:
            case "submit":
                store.submit(SPEC)
            case "step":
                controller.step()
            case "lose":
                processes.jobs.clear()
            case "cancel" if running:
                store.move(running[0], "cancelling")
            case "succeed" if running:
                store.move(running[-1], "succeeded", result={})
    controller.step()
    running = [record.id for record in store.page(status="running")]
    waiting = store.queue(100)
    assert processes.jobs == set(running)
    assert not store.page(status="cancelling")
    assert len(running) == parallel_jobs or (len(running) < parallel_jobs and not waiting)
    store.close()
