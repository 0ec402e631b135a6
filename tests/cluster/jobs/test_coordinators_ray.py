"""Promises of coordinators on a cluster: a job that pauses gives its processes back, and one that kills them its place."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import RayError

from chainfed_ray.cluster.jobs import coordinators as module
from chainfed_ray.cluster.jobs.control import cancel, pause, resume
from chainfed_ray.cluster.jobs.controller import Controller
from chainfed_ray.cluster.jobs.coordinators import NAMESPACE, RayCoordinators
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.occupancy import occupy
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.states import Status
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_job, assert_same, fits, run
from tests.watching import client_processes, processes_below, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_job_pauses_and_goes_on(
    cluster: None, document: dict[str, Any], storage: Storage, store: JobStore, tmp_path: Path
) -> None:
    document["rounds"] |= {"total": 6, "quorum": 1}
    _, expected = run(a_job(document, tmp_path), tmp_path / "log")
    coordinators = RayCoordinators(settings := Settings(storage, client_slots=1))
    controller = Controller(settings, store, coordinators)
    job = store.submit(parse_job(document)).id
    rounds = CommitLog(storage.job(job)).rounds
    before = {process.pid for process in client_processes()}

    def stepped_to(*states: Status) -> bool:
        controller.step()
        return store.get(job).status in states

    def own_processes() -> list[Any]:
        return [one for one in processes_below("ClientActor", "CoordinatorActor") if one.pid not in before]

    wait_for(lambda: stepped_to("running") and rounds(), "first round")
    pause(store, job)
    wait_for(lambda: store.get(job).status == "paused", "pause")
    done = len(rounds())
    assert 0 < done < 6
    assert store.events(job)[-1].kind == "paused"

    # The coordinator is killed before the controller ends it. Ray makes it again, and it finds nothing to do.
    killed = ray.get(ray.get_actor(f"coordinator-{job}", NAMESPACE).ping.remote())
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: ray.get(ray.get_actor(f"coordinator-{job}", NAMESPACE).ping.remote()) != killed, "other process")
    assert store.get(job).status == "paused"
    wait_for(lambda: stepped_to("paused") and job not in coordinators.alive(), "end of the coordinator")
    wait_for(lambda: not own_processes(), "end of the processes")
    assert (store.get(job).status, len(rounds())) == ("paused", done)

    resume(store, job, fits)
    wait_for(lambda: stepped_to("succeeded", "failed"), "end of the job", 240)
    assert store.get(job).error is None
    assert_same(load_stack(storage.model(job)).stack.tensors(), expected)
    wait_for(lambda: not own_processes() if stepped_to("succeeded") else None, "end of the processes")


def test_a_job_whose_coordinators_all_die_fails_and_others_have_its_place(
    cluster: None, document: dict[str, Any], storage: Storage, store: JobStore
) -> None:
    document["rounds"] |= {"total": 500}
    coordinators = RayCoordinators(settings := Settings(storage, client_slots=1))
    controller = Controller(settings, store, coordinators)
    job, other = (store.submit(parse_job(document)).id for _ in range(2))
    killed: set[int] = set()

    def kills_until_it_fails() -> bool:
        controller.step()
        try:
            pid = ray.get(ray.get_actor(f"coordinator-{job}", NAMESPACE).ping.remote(), timeout=5)
        except (RayError, ValueError):  # it starts again, or has ended
            return store.get(job).status == "failed"
        if pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return store.get(job).status == "failed"

    wait_for(kills_until_it_fails, "end of the job", 300)
    ended = store.get(job)
    assert ended.error is not None
    assert (ended.error["type"], len(killed) >= 5) == ("CoordinatorLost", True)

    def has_begun() -> bool:
        controller.step()
        return store.get(other).status in ("validating", "running") and coordinators.alive() == {other}

    wait_for(has_begun, "the other job")
    cancel(store, other)

    def is_over() -> bool:
        controller.step()
        return store.get(other).status == "cancelled" and not coordinators.alive()

    wait_for(is_over, "end of the other job")


def test_a_coordinator_that_hangs_is_started_again(
    cluster: None, document: dict[str, Any], storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not ended, so Ray sees nothing wrong with it."""
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 5.0)
    monkeypatch.setattr(module, "_ASK_SECONDS", 0.5)
    document["rounds"] |= {"total": 500, "quorum": 1}
    coordinators = RayCoordinators(settings := Settings(storage, client_slots=1))
    controller = Controller(settings, store, coordinators)
    job = store.submit(parse_job(document)).id
    rounds = CommitLog(storage.job(job)).rounds

    def goes_on(beyond: int) -> bool:
        controller.step()
        return len(rounds()) > beyond

    wait_for(lambda: goes_on(0), "first round")
    hung = ray.get(ray.get_actor(f"coordinator-{job}", NAMESPACE).ping.remote())
    began = monotonic()
    wait_for(lambda: goes_on(0) and monotonic() - began > 3, "time in which it has answered")
    os.kill(hung, signal.SIGSTOP)
    done = len(rounds())
    wait_for(lambda: goes_on(done + 2), "further rounds", 120)
    assert not psutil.pid_exists(hung)
    assert store.get(job).status == "running"
    cancel(store, job)

    def is_over() -> bool:
        controller.step()
        return store.get(job).status == "cancelled" and not coordinators.alive()

    wait_for(is_over, "end of the job")


def test_without_a_shared_folder_every_machine_is_asked_whether_a_coordinator_goes_on(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = replace(Storage.at(tmp_path), url="s3://never/asked")
    ends = RayCoordinators(Settings(storage))
    monkeypatch.setattr(module, "is_free", lambda folder: True)  # as on a machine that never had the folder
    with occupy(storage.job("goes-on")):
        assert not ends.end("goes-on")
        wait_for(lambda: ends.end("ended"), "answer of every machine")
        assert not ends.end("goes-on")
    wait_for(lambda: ends.end("goes-on"), "end of the process")
