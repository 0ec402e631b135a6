"""Promises of how a stage ends: with its best stack by the held-out loss of its exits, whoever was killed on the way."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.chain import Window
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.evaluation.score import Score
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.federation.evaluation import ServerEvaluation, streaming
from chainfed_ray.federation.selection import best_exit, exits
from chainfed_ray.federation.state import ChainState
from chainfed_ray.model.adapters import AdapterStack, Tensors
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.result import JobResult
from chainfed_ray.records.rounds import EarlyExit, JobStarted, Round
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_job, a_round, a_start, assert_same

STAGES = 2
ROUNDS = 3  # of each stage


class Foretold(ServerEvaluation):
    """The judgements of a job, but that the early exits have the losses that were foretold, round by round."""

    def __init__(self, job: PlannedJob, losses: list[float]) -> None:
        super().__init__(job, streaming(job))
        self._losses = losses

    def early_exit(self, stack: AdapterStack, window: Window) -> tuple[Score, EarlyExit]:
        score, took = super().early_exit(stack, window)
        return score._replace(loss=self._losses.pop(0)), took


def run(document: dict[str, Any], folder: Path, losses: list[float]) -> tuple[PlannedJob, list[Round], list[Tensors]]:
    """The job, killed after each round: its records, and the stack after each."""
    document["rounds"] |= {"total": STAGES * ROUNDS, "convergence": {"rule": "none"}}
    job, left = a_job(document, folder), list(losses)
    rounds, stacks = list[Round](), list[Tensors]()
    while True:
        coordinator = Coordinator(job, LocalPool(job.base), CommitLog(folder / "log"), Foretold(job, left))
        record = next(coordinator.rounds(), None)
        if record is None:
            assert not left
            return job, rounds, stacks
        rounds.append(record)
        stacks.append(coordinator.stack().tensors())


@pytest.mark.slow
def test_a_stage_ends_with_its_best_stack(document: dict[str, Any], tmp_path: Path) -> None:
    _, rounds, stacks = run(document, tmp_path, [3.0, 1.0, 2.0, 3.0, 2.0, 1.0])
    restored = [record.restored and (record.restored.round, record.restored.loss) for record in rounds]
    assert restored == [None, None, (1, 1.0), None, None, None]
    assert_same(stacks[2], stacks[1])
    assert any(not torch.equal(stacks[5][name], stacks[4][name]) for name in stacks[5])
    assert rounds[2].evaluation is not None
    assert rounds[2].held_out_loss == 2.0, "what was judged after the round stays on record"


@pytest.mark.slow
def test_a_stage_that_only_lost_ends_as_it_began(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"]["head"] = "fitted"
    job, rounds, stacks = run(document, tmp_path, [90.0, 80.0, math.nan, -1.0, 80.0, math.inf])
    first = rounds[0].head_fit
    assert first is not None
    assert first.held_out_loss is not None
    back = rounds[2].restored
    assert back is not None
    assert (back.round, back.loss, back.accuracy) == (None, first.held_out_loss, first.accuracy)
    assert (rounds[2].kept_loss, rounds[2].kept_accuracy) == (back.loss, back.accuracy)
    assert (rounds[1].kept_loss, rounds[1].kept_accuracy) == (80.0, rounds[1].accuracy)
    judged, _ = ServerEvaluation(job, streaming(job)).early_exit(AdapterStack.from_tensors(stacks[2]), Window(1, 2))
    assert judged.loss == pytest.approx(first.held_out_loss, rel=1e-5)
    assert judged.accuracy == first.accuracy
    assert rounds[5].restored is not None
    assert rounds[5].restored.round == 3
    assert_same(stacks[5], stacks[3])
    job_finished = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log")).finish()
    job_started = CommitLog(tmp_path / "log").job_started()
    assert isinstance(job_started, JobStarted)
    result = JobResult.of("tiny", job_started, rounds, job_finished)
    assert [stage.accuracy for stage in result.stages] == [first.accuracy, rounds[3].accuracy]


@pytest.mark.slow
@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], ids=["goes back", "stays"])
def test_the_server_forgets_what_its_stage_went_back_from(
    losses: list[float], document: dict[str, Any], tmp_path: Path
) -> None:
    document["aggregation"] = {"optimizer": "adam"}
    document["rounds"] |= {"total": STAGES * ROUNDS, "convergence": {"rule": "none"}}
    job, log = a_job(document, tmp_path), CommitLog(tmp_path / "log")
    rounds = Coordinator(job, LocalPool(job.base), log, Foretold(job, list(losses))).rounds()
    end = next(record for record in rounds if record.ended)
    assert (end.restored is None) == (losses[-1] == min(losses))
    server = ChainState.of(log.tensors(end.index), job.spec.aggregation).server
    assert bool(server.tensors) == (end.restored is None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"rounds": {"restore_best": False}}, {"chain": {"schedule": "cyclic"}}], ids=["no", "cyclic"]
)
def test_windows_that_take_turns_keep_their_last_stack_and_so_does_who_asks(
    changes: dict[str, Any], document: dict[str, Any], tmp_path: Path
) -> None:
    for section, keys in changes.items():
        document[section] |= keys
    _, rounds, stacks = run(document, tmp_path, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert all(record.restored is None for record in rounds)
    assert any(not torch.equal(stacks[5][name], stacks[4][name]) for name in stacks[5])


@pytest.mark.slow
@given(st.lists(st.one_of(st.none(), st.floats(0, 10)), min_size=1, max_size=8))
def test_the_best_exit_has_the_least_loss_and_is_the_newest_of_equals(losses: list[float | None]) -> None:
    rounds = [a_round(index, a_start(), held_out_loss=loss) for index, loss in enumerate(losses)]
    best, known = best_exit(exits(rounds)), [loss for loss in losses if loss is not None]
    if not known:
        assert best is None
        return
    assert best is not None
    assert best.loss == min(known)
    assert best.round is not None
    assert losses[best.round] == best.loss
    assert all(loss != best.loss for loss in losses[best.round + 1 :])


def test_the_paper_keeps_its_last_stack(document: dict[str, Any]) -> None:
    assert parse_job(document).rounds.restore_best
    assert not parse_job(document | {"recipe": "paper"}).rounds.restore_best
