"""Promises of what the server judges: when, by whom, which stack was the best, and that a failure costs nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.adapter import AdapterStack, Tensors
from chainfed_ray.commit_log import CommitLog
from chainfed_ray.coordinator import Coordinator
from chainfed_ray.errors import EvaluationFailed
from chainfed_ray.evaluator import Evaluated, Evaluator
from chainfed_ray.job import Job
from chainfed_ray.judgement import Judgement
from chainfed_ray.judging import Judging, is_due, streaming
from chainfed_ray.pool import LocalPool
from chainfed_ray.records import Ending, Result, Round
from chainfed_ray.saved_stack import load_stack, save_models
from chainfed_ray.schedule import rate_at
from chainfed_ray.score import macro_f1
from chainfed_ray.sections import RoundsSpec
from tests.conftest import a_job
from tests.test_coordinator import assert_same


class Moody:
    """The streaming evaluator under another name: it adds to each loss what ``moods`` has next, or fails where that is None."""

    engine = "moody"

    def __init__(self, evaluator: Evaluator, moods: list[float | None]) -> None:
        self._evaluator, self._moods = evaluator, moods

    def judge(self, stack: AdapterStack, examples: str) -> Evaluated:
        mood = self._moods.pop(0)
        if mood is None:
            raise EvaluationFailed(self.engine, "it is not in the mood")
        found = self._evaluator.judge(stack, examples)
        return replace(found, judgement=replace(found.judgement, losses=found.judgement.losses + mood))

    def close(self) -> None:
        self._evaluator.close()


def trained(
    job: Job, folder: Path, moods: list[float | None]
) -> tuple[Coordinator, list[Round], list[Tensors], Ending]:
    """The job, killed after each round; the stack after each of them."""
    moody = Moody(streaming(job), moods)
    rounds, stacks = list[Round](), list[Tensors]()
    while True:
        coordinator = Coordinator(job, LocalPool(job.base), CommitLog(folder / "log"), Judging(job, moody))
        record = next(coordinator.rounds(), None)
        if record is None:
            return coordinator, rounds, stacks, coordinator.finish()
        rounds.append(record)
        stacks.append(coordinator.stack().tensors())


@pytest.mark.slow
@pytest.mark.parametrize("serve", ["last", "best"])
def test_the_best_stack_and_the_last_are_both_kept(serve: str, document: dict[str, Any], tmp_path: Path) -> None:
    document["evaluation"] = {"whole_every": "round", "serve": serve}
    job = a_job(document, tmp_path)
    coordinator, rounds, stacks, ending = trained(job, tmp_path, [30, 10, 20, 20, 0])
    assert ending.best is not None
    assert (ending.served, ending.best.round, len(rounds)) == (serve, 1, 4)
    assert "after round 4, the last one judged, it had" in ending.best.why
    save_models(coordinator.models(), ending.served, tmp_path)
    for name, stack in (("best", stacks[1]), ("last", stacks[-1])):
        assert_same(load_stack(tmp_path / ("model" if name == serve else name)).stack.tensors(), stack)
    expected = streaming(job).judge(AdapterStack.from_tensors(stacks[1 if serve == "best" else -1]), "test").judgement
    assert ending.accuracy == int(expected.right.sum()) / len(job.test)


@pytest.mark.slow
def test_a_last_stack_that_is_the_best_is_the_model(document: dict[str, Any], tmp_path: Path) -> None:
    document["evaluation"] = {"whole_every": "round", "serve": "best"}
    coordinator, _, stacks, ending = trained(a_job(document, tmp_path), tmp_path, [30, 20, 10, 0, 0])
    assert ending.best is not None
    assert (ending.served, ending.best.round) == ("last", 3)
    save_models(coordinator.models(), ending.served, tmp_path)
    assert_same(load_stack(tmp_path / "model").stack.tensors(), stacks[-1])
    assert not (tmp_path / "best").exists()


@pytest.mark.slow
def test_failures_are_noted_and_cost_nothing_else(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    plain = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "plain"))
    list(plain.rounds())
    document["evaluation"] = {"whole_every": 3}
    failing = a_job(document, tmp_path)
    coordinator, rounds, _, ending = trained(failing, tmp_path, [None] * 9)
    assert_same(coordinator.stack().tensors(), plain.stack().tensors())
    said = "EvaluationFailed: the evaluation by moody failed: it is not in the mood"
    noted = [(record.index, record.evaluation.failure) for record in rounds if record.evaluation]
    ends = [record.index for record in rounds if record.ended]
    assert noted == [(index, said) for index in sorted({2, *ends})]
    assert ending.evaluation is not None
    assert (ending.evaluation.engine, ending.evaluation.failure, ending.best) == ("torch", said, None)
    assert ending.accuracy == plain.finish().accuracy
    assert Result.of("tiny", job.classes, coordinator.open(), rounds, ending).evaluation == ending.evaluation


@given(often=st.integers(1, 9), rounds=st.integers(1, 40))
def test_every_so_many_rounds_and_at_each_end_of_a_stage(often: int, rounds: int) -> None:
    due = [index for index in range(rounds) if is_due(often, index, stage_ends=False)]
    assert due == list(range(often - 1, rounds, often))
    for anything in (often, "round", "stage"):
        assert is_due(anything, rounds, stage_ends=True)  # type: ignore[arg-type]
    assert not is_due("stage", rounds, stage_ends=False)
    assert is_due("round", rounds, stage_ends=False)


@given(warmup=st.integers(0, 20), limit=st.integers(1, 30), decay=st.sampled_from(["cosine", "linear", "none"]))
def test_rates_rise_to_the_full_rate_and_fall_towards_none(warmup: int, limit: int, decay: Any) -> None:
    rates = [rate_at(RoundsSpec(warmup=warmup, decay=decay), spent, limit) for spent in range(limit)]
    peak = min(warmup, limit - 1)
    assert rates[peak] == 1
    assert rates[:peak] == pytest.approx([(spent + 1) / (peak + 1) for spent in range(peak)])
    assert all(0 < later <= earlier for earlier, later in zip(rates[peak:], rates[peak + 1 :], strict=False))
    if decay == "linear":
        assert rates[peak:] == pytest.approx([1 - place / (limit - peak) for place in range(limit - peak)])


@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_macro_f1_is_the_mean_over_classes_that_occur(pairs: list[tuple[int, int]]) -> None:
    labels, found = (torch.tensor(values) for values in zip(*pairs, strict=True))
    whole = Judgement.blank(len(pairs))
    scores = []
    for name in {value for pair in pairs for value in pair}:
        hits = sum(pair == (name, name) for pair in pairs)
        misses = sum((name in pair) and pair != (name, name) for pair in pairs)
        scores.append(2 * hits / (2 * hits + misses))
    assert macro_f1(replace(whole, classes=found), labels.numpy()) == pytest.approx(sum(scores) / len(scores))
