"""Promises of large fleets: what planning a job, recording its start and ordering a round take does not grow with its square.

Work is counted, not timed: how many plans are made, how many clients are asked, how many bytes are written.
"""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chainfed_ray.budget import planner as arithmetic
from chainfed_ray.client.messages import Client, TurnOrder, Update
from chainfed_ray.client.pool import LocalPool, Outcome
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.federation.run import run_job
from chainfed_ray.planning import admission
from chainfed_ray.planning.admission import Planner, admit
from chainfed_ray.planning.candidates import Candidate
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.fleet import CLIENTS_FILE
from chainfed_ray.records.manifest import Manifest
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_job, like
from tests.pools import Backwards, Heard

MANY = 10_000


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the arithmetic of plans was asked."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        return call

    for name in ("plan", "fallback_plan", "shortfall"):
        monkeypatch.setattr(admission, name, counted(name, getattr(arithmetic, name)))
    return counts


@pytest.fixture
def job(document: dict[str, Any], tmp_path: Path) -> PlannedJob:
    """A job of one round with five of eight clients."""
    document["fleet"]["clients"][0]["count"] = 8
    document["rounds"] |= {"clients": 5, "total": 1}
    return a_job(document, tmp_path)


def a_fleet(job: PlannedJob, count: int) -> list[Candidate]:
    """Clients like those of ``job``: a tenth cannot take part, and half have a limit of their disk, each another one."""
    alike = [candidate for candidate, _ in job.admitted]
    return [
        replace(
            alike[place % len(alike)],
            name=f"phone-{place}",
            memory=2**10 if place % 10 == 9 else 2**26,
            disk=None if place % 4 < 2 else 2**30 + place,
        )
        for place in range(count)
    ]


def of_many(job: PlannedJob, count: int) -> PlannedJob:
    """The job with a fleet of ``count`` clients."""
    planner = Planner(job.planner.costs, job.planner.requirements)
    return replace(job, planner=planner, admission=admit(planner, a_fleet(job, count), job.window))


@pytest.mark.slow
def test_clients_that_are_alike_are_planned_once(job: PlannedJob, made: Counter[str]) -> None:
    of_many(job, 100)
    few = dict(made)
    made.clear()
    many = of_many(job, MANY)
    assert (len(many.admitted), len(many.admission.excluded)) == (MANY * 9 // 10, MANY // 10)
    assert dict(made) == few, "ten thousand are no more work than a hundred of the same kinds"
    assert sum(made.values()) < 40
    for candidate, plan in many.admitted[:: MANY // 20]:
        resources = many.planner.resources(candidate)
        alone = arithmetic.plan(many.planner.costs, many.planner.requirements, plan.window, resources)
        assert plan == alone, "as if planned alone, with the limit of its own disk"


@pytest.mark.slow
def test_the_record_of_the_start_does_not_grow_with_the_fleet(job: PlannedJob, tmp_path: Path) -> None:
    sizes = []
    for count in (100, MANY):
        asked, log = Heard(LocalPool(job.base)), tmp_path / str(count)
        (record,) = Coordinator(of_many(job, count), asked, CommitLog(log)).rounds()
        (names,) = asked.asked
        assert names == [turn.client for turn in record.turns], "only who takes part in a round is in it"
        assert len(names) == 5
        assert len((log / CLIENTS_FILE).read_bytes().splitlines()) == count
        sizes.append((log / "started.json").stat().st_size)
    assert sizes[1] < sizes[0] + 100, "a few more digits"


@pytest.mark.slow
def test_a_round_reads_nothing_again(document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the rounds before it nor the partition of the whole fleet: eight rounds read as much as two."""
    reads: Counter[str] = Counter()
    for kind, name in ((CommitLog, "rounds"), (CommitLog, "job_started"), (Manifest, "canonical")):
        original = getattr(kind, name)

        def counted(self: Any, name: str = name, original: Callable[[Any], Any] = original) -> Any:
            reads[name] += 1
            return original(self)

        monkeypatch.setattr(kind, name, counted)
    document["rounds"]["convergence"] = {"rule": "none"}
    of = {}
    for total in (3, 8):
        document["rounds"]["total"] = total
        records = list(run_job(parse_job(document), tmp_path / str(total)))
        assert len(records) == total + 2
        of[total] = dict(reads)
        reads.clear()
    assert of[8] == of[3]


class Weighed(Backwards):
    """A pool whose last client answers first. It notes how many updates are in memory when it is asked for the next one."""

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        self.most, given = 0, list[weakref.ref[torch.Tensor]]()
        for place in reversed(range(len(clients))):
            outcome = Outcome(place, next(super().run([clients[place]], order, deadline)).result)
            assert isinstance(outcome.result, Update)
            given.append(weakref.ref(outcome.result.tensors["head.linear.weight"]))
            yield outcome
            del outcome
            gc.collect()
            self.most = max(self.most, sum(tensor() is not None for tensor in given))


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "held"), [("mean", 1), ("median", 5)])
def test_a_mean_holds_one_update_however_many_there_are(job: PlannedJob, tmp_path: Path, rule: str, held: int) -> None:
    """Updates that arrive before those of earlier clients are not held, unless the rule needs all of them."""
    job, pool = like(job, tmp_path, aggregation={"rule": rule}), Weighed(LocalPool(job.base))
    list(Coordinator(job, pool, CommitLog(tmp_path / "log")).rounds())
    assert pool.most == held
