"""Promises of the Ray pool: it is the local pool, bit for bit, and a client that dies costs its turn."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from chainfed_ray.client import Profile, Profiling
from chainfed_ray.commit_log import CommitLog
from chainfed_ray.coordinator import Coordinator
from chainfed_ray.pool import Failure, LocalPool
from cluster.ray_pool import RayPool
from cluster.resources import of_one_machine
from tests.conftest import a_job
from tests.test_architecture import ROOT
from tests.test_coordinator import assert_same, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        num_cpus=2,
        resources=of_one_machine(2, 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


def client_processes() -> list[psutil.Process]:
    """The processes of our client actors: children of this process's Ray alone."""
    return [child for child in psutil.Process().children(recursive=True) if "ClientActor" in " ".join(child.cmdline())]


def private_bytes() -> dict[int, int]:
    """What each client's process holds of its own: not the pages of libraries, nor of the store that it shares."""
    status = {process.pid: Path(f"/proc/{process.pid}/status").read_text() for process in client_processes()}
    return {pid: int(text.split("RssAnon:")[1].split()[0]) * 1024 for pid, text in status.items()}


def test_ray_pool_is_the_local_pool(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"]["start"] = "auto"
    job = a_job(document, tmp_path)
    local, expected = run(job, tmp_path / "local")
    pool = RayPool(job.base, slots=2)
    try:
        distributed, found = run(job, tmp_path / "ray", pool)
    finally:
        pool.close()
    assert local.open() == distributed.open()
    assert_same(found, expected)


def test_a_killed_client_costs_its_turn_and_the_job_goes_on(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"] |= {"clients": 4, "quorum": 3}
    job = a_job(document, tmp_path)
    pool = RayPool(job.base, slots=1)
    try:
        outcomes = pool.run(job.clients, Profiling(8, 0), 120.0)
        assert isinstance(next(outcomes).result, Profile)
        for process in client_processes():
            process.send_signal(signal.SIGKILL)
        rest = [outcome.result for outcome in outcomes]
        assert [type(result) for result in rest].count(Failure) == 1
        died = next(result for result in rest if isinstance(result, Failure))
        assert "died" in died.reason
        records = list(Coordinator(job, pool, CommitLog(tmp_path / "log")).rounds())
        assert all(record.counted and not record.lost for record in records)
    finally:
        pool.close()


def test_a_missed_deadline_is_a_failure_and_nothing_hangs(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    pool = RayPool(job.base, slots=1)
    try:
        outcomes = list(pool.run(job.clients, Profiling(8, 0), 0.01))
    finally:
        pool.close()
    assert sorted(outcome.place for outcome in outcomes) == [0, 1, 2, 3]
    assert all(isinstance(outcome.result, Failure) and "deadline" in outcome.result.reason for outcome in outcomes)


def test_what_was_planned_is_enough_for_a_pretrained_model(tmp_path: Path) -> None:
    """Every stage of the demo's job, in processes of the clients' own, with real weights and real text."""
    demo = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())
    demo["chain"] |= {"start": 2}
    demo["rounds"] |= {"total": 3, "clients": 3}
    job = a_job(demo, tmp_path)
    pool = RayPool(job.base, slots=2)
    try:
        list(pool.run(job.clients[:2], Profiling(8, 0), 120.0))
        idle = private_bytes()
        records = list(Coordinator(job, pool, CommitLog(tmp_path / "log")).rounds())
        after = private_bytes()
    finally:
        pool.close()
    assert [record.bottom for record in records] == [2, 3, 4]
    kept = [after[pid] - idle[pid] for pid in idle.keys() & after.keys()]
    assert kept
    # The allocator keeps a few MiB, not always as many; that no tensor is kept is tests/test_client.py's to show.
    assert max(kept) < 16 * 2**20, "a client's memory is given back when its lease ends"
    for turn in (turn for record in records for turn in record.turns):
        assert turn.peak_bytes is not None
        assert 10 * 2**20 < turn.peak_bytes <= turn.planned_bytes, turn.client


def test_a_local_pool_puts_an_error_on_record(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    broken = LocalPool(type(job.base)(tmp_path / "nowhere", job.base.dtype, job.base.scratch))
    outcome = next(broken.run(job.clients[:1], Profiling(8, 0), 10.0))
    assert isinstance(outcome.result, Failure)
    assert "UnsupportedModel" in outcome.result.reason
