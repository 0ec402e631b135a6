"""``python -m benchmarks scale``: modelled clients make the same job each time, and every round is metered once."""

from pathlib import Path
from typing import Any

from benchmarks.scale_pool import MeteredPool, ModelledPool
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.records.commit_log import CommitLog
from tests.builders import a_job, assert_same, story


def test_modelled_clients_are_the_same_each_time_and_metered_by_round(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"]["convergence"] = {"rule": "none"}
    job, stacks = a_job(document, tmp_path), []
    for run in ("first", "second"):
        pool = MeteredPool(ModelledPool())
        coordinator = Coordinator(job, pool, CommitLog(tmp_path / run))
        records = list(coordinator.rounds())
        pool.end_round()
        assert len(pool.rounds) == len(records) == 4
        for seen, record in zip(pool.rounds, records, strict=True):
            assert seen.turns >= len(record.turns) + len(record.failed_turns) == 3
            assert seen.cpu_seconds > 0
            assert seen.peak_bytes > 0
        stacks.append(coordinator.stack().tensors())
    assert_same(*stacks)
    assert story(tmp_path / "first") == story(tmp_path / "second")


def test_a_modelled_turn_stays_in_its_plan(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    (first, *_) = Coordinator(job, ModelledPool(), CommitLog(tmp_path / "log")).rounds()
    for turn in first.turns:
        assert turn.peak_bytes is not None
        assert 0.7 * turn.planned_bytes <= turn.peak_bytes + 1 <= turn.planned_bytes + 1
        assert turn.seconds > 0
