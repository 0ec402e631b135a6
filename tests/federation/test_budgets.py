"""The budget as a contract, in the algorithm: windows as wide as each client can hold, and a second turn for who exceeded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Training, Update
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.client.turn import take_turn
from chainfed_ray.errors import QuorumLost
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.seeds import derive
from tests.builders import a_job, assert_mean, smallest_budget
from tests.pools import Greedy

pytestmark = pytest.mark.slow


def test_an_adapter_is_averaged_over_those_that_trained_it(mixed: PlannedJob, tmp_path: Path) -> None:
    """A mixed fleet against the mean, tensor by tensor, of what each client gives by itself."""
    coordinator = Coordinator(mixed, LocalPool(mixed.base), CommitLog(tmp_path / "log"))
    (record,) = coordinator.rounds()
    assert [(turn.client, turn.bottom) for turn in record.turns] == [
        ("large-0", 1), ("large-1", 1), ("small-0", 3), ("small-1", 3),
    ]  # fmt: skip

    before = AdapterStack.new(range(1, 4), mixed.hidden, 4096, 3, derive(3, "stack")).tensors()
    order = Training(
        before,
        Window(1, 3),
        3,
        epochs=1,
        batch_size=8,
        learning_rate=0.01,
        head_learning_rate=mixed.spec.rounds.head_learning_rate,
        global_weight=0.1,
        global_trains="head",
        seed=derive(3, "round", 0),
    )
    base = replace(mixed.base, scratch=tmp_path / "scratch")
    updates = [take_turn(client, base, lambda: order, capped=False) for client in mixed.clients]
    after = coordinator.stack().tensors()
    for name, tensor in after.items():
        total, weight = torch.zeros_like(tensor, dtype=torch.float64), 0
        for update in updates:
            assert isinstance(update, Update)
            if name in update.tensors:
                total += update.tensors[name].double() * update.examples
                weight += update.examples
        assert_mean(tensor, total / weight, record)
    trained_by = {
        name: sum(name in update.tensors for update in updates if isinstance(update, Update)) for name in after
    }
    assert trained_by["adapters.1.up.weight"] == trained_by["adapters.2.up.weight"] == 2
    assert trained_by["adapters.3.up.weight"] == trained_by["head.linear.weight"] == 4


def test_q_is_what_the_largest_client_holds(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= {"window": 3, "start": 1, "adapter": {"bottleneck": 4096}}
    budget = smallest_budget(document, tmp_path, 3) - 1
    document["fleet"]["clients"][0]["memory"] = budget
    job = a_job(document, tmp_path)
    assert job.window == 2
    job_started = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log")).open()
    assert (job_started.window, job_started.stages) == (2, 2)
    document["fleet"]["clients"][0]["memory"] = budget + 1
    assert a_job(document, tmp_path).window == 3


@pytest.fixture
def greedy_job(document: dict[str, Any], tmp_path: Path) -> PlannedJob:
    document["chain"] |= {"adapter": {"bottleneck": 4096}}
    document["rounds"] |= {"total": 3, "clients": 4, "quorum": 3}
    return a_job(document, tmp_path)


def test_who_exceeds_a_plan_has_a_second_turn_with_a_leaner_one(greedy_job: PlannedJob, tmp_path: Path) -> None:
    job = greedy_job
    first = job.clients[1].plan.planned_bytes
    pool = Greedy(LocalPool(job.base), {"phone-1"}, enough=first - 1)
    records = list(Coordinator(job, pool, CommitLog(tmp_path / "log")).rounds())
    assert all(not record.failed_turns for record in records)
    turns = [turn for record in records for turn in record.turns if turn.client == "phone-1"]
    assert [turn.exceeded is not None for turn in turns] == [True, False, False], "it remembers"
    assert turns[0].exceeded is not None
    assert "BudgetExceeded: the turn was planned to take" in turns[0].exceeded
    assert all(turn.planned_bytes <= first * 2 // 3 for turn in turns)
    (_, tight, held_to_plan), (_, lean, held_to_budget), *_ = pool.tried
    assert (tight, held_to_plan) == (first, first)
    assert lean < first < held_to_budget == job.clients[1].budget_bytes


def test_who_exceeds_a_leaner_plan_as_well_is_left_out(greedy_job: PlannedJob, tmp_path: Path) -> None:
    job = greedy_job
    pool = Greedy(LocalPool(job.base), {"phone-1"}, enough=0)
    log = CommitLog(tmp_path / "log")
    records = list(Coordinator(job, pool, log).rounds())
    assert [lost.client for lost in records[0].failed_turns] == ["phone-1"]
    assert records[0].failed_turns[0].over_budget
    assert all(record.counted for record in records)
    assert all(not record.failed_turns for record in records[1:]), "it is not asked again"
    assert len(pool.tried) == 2
    assert CommitLog(tmp_path / "log").rounds() == records


def test_when_all_are_left_out_the_job_says_so(greedy_job: PlannedJob, tmp_path: Path) -> None:
    everybody = {client.name for client in greedy_job.clients}
    coordinator = Coordinator(greedy_job, Greedy(LocalPool(greedy_job.base), everybody, 0), CommitLog(tmp_path / "log"))
    with pytest.raises(QuorumLost, match=r"round 2: fewer than 3 .*BudgetExceeded"):
        list(coordinator.rounds())


@pytest.mark.parametrize("start", [1, "auto"])
def test_a_client_without_disk_makes_the_prefix_anew(document: dict[str, Any], tmp_path: Path, start: Any) -> None:
    """The same bits as with a cache that is made example by example."""
    document["chain"] |= {"start": start, "window": 1, "cka_threshold": 1.0}
    document["fleet"]["clients"] = [
        {"name": "cached", "count": 2, "memory": "64MiB"},
        {"name": "diskless", "count": 2, "memory": "64MiB", "disk": 1},
    ]
    job = a_job(document, tmp_path)
    cached, diskless = job.clients[0], job.clients[2]
    assert (cached.plan.prefix.cached, diskless.plan.prefix.cached) == (True, False)
    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log"))
    records = list(coordinator.rounds())
    assert all(record.counted and not record.failed_turns for record in records)

    order = Training(
        coordinator.stack().tensors(),
        Window(2, 2),
        2,
        epochs=1,
        batch_size=8,
        learning_rate=0.01,
        head_learning_rate=0.01,
        global_weight=0.1,
        global_trains="head",
        seed=0,
    )
    base = replace(job.base, scratch=tmp_path / "scratch")
    plan = replace(diskless.plan, window=Window(2, 2))
    anew = replace(diskless, plan=plan)
    once = replace(diskless, plan=replace(plan, prefix=replace(plan.prefix, cached=True)))
    first, second = (take_turn(client, base, lambda: order, capped=False) for client in (anew, once))
    assert isinstance(first, Update)
    assert isinstance(second, Update)
    assert list((base.scratch / diskless.name).glob("*.activations")), "the second kept them"
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


def test_a_wrong_plan_costs_a_turn_and_is_on_record(greedy_job: PlannedJob, tmp_path: Path) -> None:
    """A turn in this process is measured and not capped: the record shows both numbers."""
    pool = LocalPool(greedy_job.base)
    (record, *_) = Coordinator(greedy_job, pool, CommitLog(tmp_path / "log")).rounds()
    for turn in record.turns:
        assert turn.budget_bytes == 64 * 2**20
        assert turn.planned_bytes <= turn.budget_bytes
        assert turn.peak_bytes is not None


def test_where_no_plan_is_leaner_the_second_turn_has_the_whole_budget(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    assert job.planner.fallback_plan(job.admitted[0][0], Window(1, 2)) is None
    pool = Greedy(LocalPool(job.base), {client.name for client in job.clients}, modest=True)
    records = list(Coordinator(job, pool, CommitLog(tmp_path / "log")).rounds())
    assert all(record.counted and not record.failed_turns for record in records)
    assert all(turn.exceeded for turn in records[0].turns)
