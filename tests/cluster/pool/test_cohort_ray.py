"""An unreliable fleet on Ray: who does not answer is never given a process, and who is slow is cut off in the middle."""

import math
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from chainfed_ray.client.messages import Profile, Profiling
from chainfed_ray.client.pool import Failure
from chainfed_ray.cluster.pool.ray_pool import RayPool
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.records.commit_log import CommitLog
from tests.builders import a_job, assert_same, run, story
from tests.clusters import a_pool
from tests.watching import client_processes, wait_for

_SILENCE = 2.0  # seconds

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def test_ray_pool_is_the_local_pool(document: dict[str, Any], tmp_path: Path, ray_pool: RayPool) -> None:
    document["fleet"]["clients"][0] |= {"availability": 0.5}
    document["rounds"] |= {"total": 3, "clients": 4, "quorum": 2}
    job = a_job(document, tmp_path)
    _, expected = run(job, tmp_path / "local")
    _, found = run(job, tmp_path / "ray", ray_pool)
    assert_same(found, expected)
    assert story(tmp_path / "ray") == story(tmp_path / "local")
    assert any(record.failed_turns for record in CommitLog(tmp_path / "ray").rounds())


def test_a_slow_client_misses_the_deadline_and_the_round_goes_on(document: dict[str, Any], tmp_path: Path) -> None:
    """The processes are there before, so that the deadline is that of turns; the slow one's is ended while it sleeps."""
    document["fleet"]["clients"] = [
        {"name": "phone", "count": 2, "memory": "64MiB"},
        {"name": "snail", "memory": "64MiB", "speed": 1e-5},
    ]
    document["rounds"] |= {"total": 1, "clients": 3, "quorum": 2, "deadline": "10s"}
    job = a_job(document, tmp_path)
    quick = [replace(client, speed=1.0) for client in job.clients]
    others = {process.pid for process in client_processes()}

    def processes() -> int:
        return len({process.pid for process in client_processes()} - others)

    with a_pool(job.base, slots=2) as pool:
        patience = monotonic() + 300
        while processes() < 2:  # one of each class; the first makes room if the other is slow to start
            assert monotonic() < patience
            assert all(isinstance(result, Profile) for _, result in pool.run(quick[1:], Profiling(8, 0), 300.0))
        started = monotonic()
        (record,) = Coordinator(job, pool, CommitLog(tmp_path / "log")).rounds()
        assert 10 <= monotonic() - started < 60, "it is the deadline that ends the round"
        assert record.counted
        assert [turn.client for turn in record.turns] == ["phone-0", "phone-1"]
        (late,) = record.failed_turns
        assert late.client == "snail-0"
        assert late.reason.startswith("missed the deadline of 10 s: it was working as slowly as its machine (")
        assert "; `rounds.deadline: auto` waits" in late.reason
        # Its process sleeps for hours, and is ended all the same: a moment later, since Ray is only told to.
        wait_for(lambda: processes() == 1, "end of the process of the slow client")
        (outcome,) = pool.run(quick[2:], Profiling(8, 0), 300.0)
        assert isinstance(outcome.result, Profile), "its place is free again"


def test_without_a_deadline_a_turn_may_take_as_long_as_it_works(document: dict[str, Any], tmp_path: Path) -> None:
    """It may be much slower than any may be silent. A process that does nothing, here one that is stopped, is given up."""
    job = a_job(document, tmp_path)
    others = {process.pid for process in client_processes()}
    with a_pool(job.base, slots=1, silence=_SILENCE) as pool:
        (outcome,) = pool.run(job.clients[:1], Profiling(8, 0), 300.0)
        assert isinstance(outcome.result, Profile), "the process is there now"
        slow = replace(job.clients[0], speed=min(outcome.result.cpu_seconds / (4 * _SILENCE), 0.5))
        started = monotonic()
        (outcome,) = pool.run([slow], Profiling(8, 0), math.inf)
        assert isinstance(outcome.result, Profile)
        assert monotonic() - started > 3 * _SILENCE
        (process,) = [process for process in client_processes() if process.pid not in others]
        process.suspend()
        try:
            (outcome,) = pool.run(job.clients[:1], Profiling(8, 0), math.inf)
        finally:
            process.kill()
        assert outcome.result == Failure(f"nothing happened for {_SILENCE:g} s: its process does not answer")
        (outcome,) = pool.run(job.clients[:1], Profiling(8, 0), 300.0)
        assert isinstance(outcome.result, Profile), "its place is free again"
