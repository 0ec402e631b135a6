"""Promises of the Ray pool: it is the local pool, bit for bit, and a client that dies costs its turn."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import ray
import yaml
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ray.exceptions import GetTimeoutError, NodeDiedError, ObjectLostError, ObjectStoreFullError

from chainfed_ray.client.messages import Profile, Profiling
from chainfed_ray.client.pool import Failure, LocalPool
from chainfed_ray.cluster.pool.autoscaler import has_been_given_room
from chainfed_ray.cluster.pool.leases import Lease
from chainfed_ray.cluster.pool.placement import check_memories
from chainfed_ray.cluster.pool.ray_pool import RayPool
from chainfed_ray.cluster.resources import CLIENT_SLOT, client_options
from chainfed_ray.cluster.tracing import begin_tracing, end_tracing
from chainfed_ray.data import docstrings
from chainfed_ray.errors import InvalidJob
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.model.source import ModelSource
from chainfed_ray.planning.admission import Planner, admit
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import JobStarted
from tests.builders import MIB, a_job, assert_same, run
from tests.clusters import a_pool
from tests.project import ROOT
from tests.watching import (
    client_processes,
    private_bytes,
    processes_below,
    running,
    wait_for,
    watched_from_outside,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@ray.remote(num_cpus=0)
class _Owner:
    """Owns an object, which is lost when this process dies."""

    def put(self) -> list[Any]:
        """A reference to a new object. In a list, because Ray would fetch a bare one."""
        return [ray.put("an order")]


@ray.remote(concurrency_groups={"asked": 1})  # type: ignore[call-overload]  # its types lack this option
class _NeverReady:
    """A client's process that Ray has placed, and whose start hangs."""

    def __init__(self, base: ModelSource) -> None:
        Event().wait()

    def prepare(self) -> None:
        """See ``ClientActor``."""

    def node(self) -> None:
        """See ``ClientActor``."""

    def take_turn(self, *_: Any) -> None:
        """See ``ClientActor``."""


def _without_python(budget_bytes: int) -> dict[str, Any]:
    """The options of a client's process on a machine where it cannot start."""
    return {**client_options(budget_bytes), "runtime_env": {"py_executable": "/bin/false"}}


def _untimed(job_started: JobStarted) -> JobStarted:
    return job_started.model_copy(update={"profile_cpu_seconds": 0.0})


def test_ray_pool_is_the_local_pool(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= {"start": "auto", "cka_threshold": 0.8, "head": "fitted"}
    job = a_job(document, tmp_path)
    local, expected = run(job, tmp_path / "local")
    notes: list[str | None] = []
    with a_pool(job.base, 2, notes.append) as pool:
        distributed, found = run(job, tmp_path / "ray", pool)
    assert _untimed(local.open()) == _untimed(distributed.open())
    assert_same(found, expected)
    assert set(notes) <= {None, "waiting for 2 of 2 processes", "waiting for 1 of 1 processes"}, "by who is ready first"
    assert notes[-1] is None


def test_a_turn_that_exceeds_its_plan_is_stopped_and_its_process_goes_on(
    document: dict[str, Any], tmp_path: Path, ray_pool: RayPool
) -> None:
    document["chain"] |= {"adapter": {"bottleneck": 8192}}
    job = a_job(document, tmp_path)
    order = Profiling(8, 0)
    tight, exporter = replace(job.clients[0], cap_bytes=2**16), InMemorySpanExporter()
    begin_tracing(exporter)
    (stopped,) = ray_pool.run([tight], order, 120.0)
    before = [process.pid for process in client_processes()]
    (taken,) = ray_pool.run([job.clients[0]], order, 120.0)
    assert [process.pid for process in client_processes()] == before
    assert isinstance(stopped.result, Failure)
    assert stopped.result.exceeded
    assert "was allowed 64KiB" in stopped.result.reason
    assert isinstance(taken.result, Profile)
    end_tracing()
    spans = exporter.get_finished_spans()
    assert [(one.name, one.status.is_ok) for one in spans] == [("turn", False), ("turn", True)]
    assert dict(spans[0].attributes or {})["chainfed.client"] == job.clients[0].name


def test_plans_that_are_too_small_cost_a_turn_each_and_the_job_goes_on(
    document: dict[str, Any], tmp_path: Path, ray_pool: RayPool
) -> None:
    """A planner that knows nothing of what the process itself takes: each client exceeds its plan, once."""
    document["chain"] |= {"adapter": {"bottleneck": 8192}}
    job = a_job(document, tmp_path)
    wrong = replace(job.planner.costs, skeleton=-16 * 2**20)
    planner = Planner(wrong, job.planner.requirements)
    job = replace(job, planner=planner, admission=admit(planner, [candidate for candidate, _ in job.admitted], 2))
    records = list(Coordinator(job, ray_pool, CommitLog(tmp_path / "log")).rounds())
    assert all(record.counted and not record.failed_turns for record in records)
    turns = [turn for record in records for turn in record.turns]
    again = [turn for turn in turns if turn.exceeded]
    assert again, "what a process takes itself is more than nothing"
    for turn in again:
        assert turn.exceeded is not None
        assert "the turn was planned to take" in turn.exceeded
        assert turn.peak_bytes is not None
        assert turn.peak_bytes < turn.budget_bytes


def test_a_killed_client_costs_its_turn_and_the_job_goes_on(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"] |= {"clients": 4, "quorum": 3}
    job = a_job(document, tmp_path)
    others = {process.pid for process in client_processes()}
    with a_pool(job.base, slots=1) as pool:
        outcomes = pool.run(job.clients, Profiling(8, 0), 120.0)
        assert isinstance(next(outcomes).result, Profile)
        for process in client_processes():
            if process.pid not in others:
                process.send_signal(signal.SIGKILL)
        rest = [outcome.result for outcome in outcomes]
        assert [type(result) for result in rest].count(Failure) == 1
        died = next(result for result in rest if isinstance(result, Failure))
        assert "died" in died.reason
        records = list(Coordinator(job, pool, CommitLog(tmp_path / "log")).rounds())
        assert all(record.counted and not record.failed_turns for record in records)


def test_whatever_ray_raises_costs_a_turn_and_a_lost_order_is_sent_anew(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other: no room for the order, an order that is gone when the client asks for it, a result that is gone."""
    job = a_job(document, tmp_path)
    put, get = ray.put, ray.get
    puts, results = iter((ObjectStoreFullError("no room"), "gone", None)), iter((None, NodeDiedError("it is gone")))

    def put_once(order: Any) -> Any:
        if isinstance(trouble := next(puts), Exception):
            raise trouble
        return of_a_dead_owner() if trouble else put(order)

    def of_a_dead_owner() -> Any:
        owner: Any = _Owner.remote()  # type: ignore[attr-defined]
        (reference,) = get(owner.put.remote())
        ray.kill(owner)
        wait_for(lambda: is_lost(reference), "loss of the object")
        return reference

    def is_lost(reference: Any) -> bool:
        try:
            get(reference, timeout=5)
        except ObjectLostError:
            return True
        except GetTimeoutError:
            pass
        return False

    def get_once(reference: Any, timeout: float | None = None) -> Any:
        if timeout and (trouble := next(results, None)):  # it is a result that is waited for
            raise trouble
        return get(reference, timeout=timeout)

    monkeypatch.setattr(ray, "put", put_once)
    monkeypatch.setattr(ray, "get", get_once)
    with a_pool(job.base, slots=1) as pool:
        outcomes = list(pool.run(job.clients, Profiling(8, 0), 300.0))
    assert [outcome.place for outcome in outcomes] == [0, 1, 2, 3]
    reasons = [outcome.result.reason if isinstance(outcome.result, Failure) else "" for outcome in outcomes]
    assert reasons[0].startswith("Ray could not run it (ObjectStoreFullError: no room")
    assert reasons[1].startswith("OwnerDiedError: ")
    assert reasons[2] == "Ray could not run it (NodeDiedError: it is gone)"
    assert isinstance(outcomes[3].result, Profile)


def test_a_client_that_no_machine_can_hold_fails_at_once_and_holds_no_place(
    document: dict[str, Any], tmp_path: Path, ray_pool: RayPool
) -> None:
    job = a_job(document, tmp_path)
    giant = replace(job.clients[1], budget_bytes=90 * 2**40)
    outcomes = list(ray_pool.run([job.clients[0], giant, job.clients[2]], Profiling(8, 0), math.inf))
    assert outcomes[0].place == 1, "before any turn"
    failure = next(result for place, result in outcomes if place == 1)
    assert isinstance(failure, Failure)
    assert failure.reason.startswith("no machine has the 90TiB that it may use: the most is ")
    assert [isinstance(result, Profile) for place, result in sorted(outcomes[1:])] == [True, True]


def test_a_class_of_clients_that_this_machine_can_never_hold_is_refused_by_its_field() -> None:
    check_memories([2**20])
    words = r"fleet\.clients\[1\]\.memory is '90TiB'; expected at most .*[MG]iB, the memory of this machine"
    with pytest.raises(InvalidJob, match=words):
        check_memories([2**20, 90 * 2**40])


def test_a_missed_deadline_is_a_failure_and_nothing_hangs(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    with a_pool(job.base, slots=1) as pool:
        outcomes = list(pool.run(job.clients, Profiling(8, 0), 0.01))
    assert sorted(outcome.place for outcome in outcomes) == [0, 1, 2, 3]
    assert all(isinstance(outcome.result, Failure) and "deadline" in outcome.result.reason for outcome in outcomes)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("broken", ["hangs", "has no Python"])
def test_a_process_that_never_gets_ready_costs_its_turn_and_nothing_is_left_of_it(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_pool: RayPool, broken: str
) -> None:
    """Without a deadline, and though another client's process is on the machine, for whose end it might wait."""
    job = a_job(document, tmp_path)
    list(ray_pool.run(job.clients[1:2], Profiling(8, 0), 300.0))
    notes: list[str | None] = []
    with a_pool(job.base, 1, notes.append, silence=8.0) as pool:
        with monkeypatch.context() as patch:
            if broken == "hangs":
                patch.setattr("chainfed_ray.cluster.pool.leases.ClientActor", _NeverReady)
            else:
                patch.setattr("chainfed_ray.cluster.pool.leases.client_options", _without_python)
            (outcome,) = pool.run(job.clients[:1], Profiling(8, 0), math.inf)
        words = "nothing happened for 8 s: its process has a machine, and does not get ready there"
        assert outcome.result == Failure(words)
        assert notes[0] == "waiting for 1 of 1 processes"
        wait_for(lambda: not running(processes_below("_NeverReady")), "end of the process")
        (outcome,) = pool.run(job.clients[:1], Profiling(8, 0), 300.0)
        assert isinstance(outcome.result, Profile), "its place is free again"


@pytest.mark.parametrize(("memory", "slots"), [(2**40, 1), (123 * MIB, 8)], ids=["for a machine", "for a client's end"])
def test_a_process_that_waits_for_room_has_no_machine(
    document: dict[str, Any], tmp_path: Path, ray_pool: RayPool, memory: int, slots: int
) -> None:
    list(ray_pool.run(a_job(document, tmp_path).clients[:1], Profiling(8, 0), 300.0))
    made: Any = _NeverReady
    actor = made.options(num_cpus=0, memory=memory, resources={CLIENT_SLOT: slots}).remote(None)
    with pytest.raises(GetTimeoutError):
        ray.get(actor.prepare.remote(), timeout=2)
    try:
        assert not Lease(actor, "any", memory, ready=None).has_machine(has_been_given_room)
    finally:
        ray.kill(actor)


def test_what_was_planned_is_enough_for_a_pretrained_model(tmp_path: Path) -> None:
    """Every stage of the demo's job, in processes of the clients' own, with real weights and a third of its real text."""
    demo = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())
    # Sums for a fitted head come from the whole fleet, and others would have these processes by the end.
    demo["chain"] |= {"start": 2, "head": "zero"}
    demo["rounds"] |= {"total": 3, "clients": 3, "local_steps": 3}
    # Each text comes three times over, so that all have as many tokens as a plan is made for: shorter ones would take less.
    some = [{"text": f"{text} {text} {text}", "label": library} for text, library in docstrings.rows()[::3]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, some)))
    demo["data"] |= {"train": f"path:{tmp_path / 'rows.jsonl'}", "max_length": 24}
    job = a_job(demo, tmp_path)
    others = {process.pid for process in client_processes()}

    def held() -> dict[int, int]:
        return {process.pid: private_bytes(process.pid) for process in client_processes() if process.pid not in others}

    with a_pool(job.base, slots=2) as pool:
        list(pool.run(job.clients[:2], Profiling(8, 0), 120.0))
        idle = held()
        with watched_from_outside(idle) as highest:
            records = list(Coordinator(job, pool, CommitLog(tmp_path / "log")).rounds())
        after = held()
    planned = max(turn.planned_bytes for record in records for turn in record.turns)
    assert highest
    for pid in highest.keys() & idle.keys():
        assert highest[pid] - idle[pid] <= planned + 2**20, "as others see it"
    assert [record.bottom for record in records] == [2, 3, 4]
    # Where starting takes long, a process makes room for one of another class: that is compared with those before.
    kept = [after[pid] - idle.get(pid, max(idle.values())) for pid in after]
    assert kept
    # The allocator keeps a few MiB, not always as many; that no tensor is kept is tests/client/test_training.py's to show.
    assert max(kept) < 16 * 2**20, "a client's memory is given back when its lease ends"
    for turn in (turn for record in records for turn in record.turns):
        assert turn.peak_bytes is not None
        # These turns hold 20 MiB, of which the allocator rounds some hundred KiB away.
        assert turn.peak_bytes <= turn.planned_bytes <= 1.35 * turn.peak_bytes + 2**19, turn.client


def test_a_local_pool_puts_an_error_on_record(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    broken = LocalPool(type(job.base)(tmp_path / "nowhere", job.base.dtype, job.base.scratch))
    outcome = next(broken.run(job.clients[:1], Profiling(8, 0), 10.0))
    assert isinstance(outcome.result, Failure)
    assert "UnsupportedModel" in outcome.result.reason
