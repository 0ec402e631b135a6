"""Promises of what the server judges: when, by whom, which stack was the best, and that a failure costs nothing else."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.budget import server
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.errors import EvaluationFailed, InvalidJob
from chainfed_ray.evaluation.evaluator import Evaluated, Evaluator
from chainfed_ray.evaluation.predictions import Predictions
from chainfed_ray.evaluation.score import Score, macro_f1
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.federation.evaluation import ServerEvaluation, is_due, streaming
from chainfed_ray.federation.stages import rate_at
from chainfed_ray.model.adapters import AdapterStack, Tensors
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.result import JobResult
from chainfed_ray.records.rounds import JobFinished, Round
from chainfed_ray.spec.parse import parse_job
from chainfed_ray.spec.sections import RoundsSpec
from tests.builders import a_job, assert_same
from tests.causal import a_causal_stack, causal_folder


class Moody:
    """The streaming evaluator under another name: it adds to each loss what ``moods`` has next, or fails where that is None.

    Where it is NaN, the stack itself is blown up, so that the model's own loss is none.
    """

    engine = "moody"

    def __init__(self, evaluator: Evaluator, moods: list[float | None]) -> None:
        self._evaluator, self._moods = evaluator, moods

    def evaluate(self, stack: AdapterStack, examples: str) -> Evaluated:
        mood = self._moods.pop(0)
        if mood is None:
            raise EvaluationFailed(self.engine, "it is not in the mood")
        if math.isnan(mood):
            return self._evaluator.evaluate(blown_up(stack), examples)
        found = self._evaluator.evaluate(stack, examples)
        return replace(found, predictions=replace(found.predictions, losses=found.predictions.losses + mood))

    def close(self) -> None:
        self._evaluator.close()


def blown_up(stack: AdapterStack) -> AdapterStack:
    """The stack with weights so large that what comes out is no number."""
    return AdapterStack.from_tensors({name: torch.full_like(old, 1e38) for name, old in stack.tensors().items()})


def trained(
    job: PlannedJob, folder: Path, moods: list[float | None]
) -> tuple[Coordinator, list[Round], list[Tensors], JobFinished]:
    """The job, killed after each round; the stack after each of them."""
    moody = Moody(streaming(job), moods)
    rounds, stacks = list[Round](), list[Tensors]()
    while True:
        coordinator = Coordinator(job, LocalPool(job.base), CommitLog(folder / "log"), ServerEvaluation(job, moody))
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
    coordinator, rounds, stacks, job_finished = trained(job, tmp_path, [30, 10, 20, 20, 0])
    assert job_finished.best is not None
    assert (job_finished.served, job_finished.best.round, len(rounds)) == (serve, 1, 4)
    assert "after round 4, the last one evaluated, it had" in job_finished.best.why
    coordinator.save(tmp_path)
    for name, stack in (("best", stacks[1]), ("last", stacks[-1])):
        assert_same(load_stack(tmp_path / ("model" if name == serve else name)).stack.tensors(), stack)
    expected = (
        streaming(job).evaluate(AdapterStack.from_tensors(stacks[1 if serve == "best" else -1]), "test").predictions
    )
    assert job_finished.accuracy == int(expected.correct.sum()) / len(job.test)


@pytest.mark.slow
def test_a_last_stack_that_is_the_best_is_the_model(document: dict[str, Any], tmp_path: Path) -> None:
    document["evaluation"] = {"whole_every": "round", "serve": "best"}
    coordinator, _, stacks, job_finished = trained(a_job(document, tmp_path), tmp_path, [30, 20, 10, 0, 0])
    assert job_finished.best is not None
    assert (job_finished.served, job_finished.best.round) == ("last", 3)
    coordinator.save(tmp_path)
    assert_same(load_stack(tmp_path / "model").stack.tensors(), stacks[-1])
    assert not (tmp_path / "best").exists()


@pytest.mark.slow
def test_failures_are_noted_and_cost_nothing_else(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    plain = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "plain"))
    list(plain.rounds())
    document["evaluation"] = {"whole_every": 3}
    failing = a_job(document, tmp_path)
    coordinator, rounds, _, job_finished = trained(failing, tmp_path, [None] * 9)
    assert_same(coordinator.stack().tensors(), plain.stack().tensors())
    said = "EvaluationFailed: the evaluation by moody failed: it is not in the mood"
    noted = [(record.index, record.evaluation.failure) for record in rounds if record.evaluation]
    ends = [record.index for record in rounds if record.ended]
    assert noted == [(index, said) for index in sorted({2, *ends})]
    assert job_finished.evaluation is not None
    assert (job_finished.evaluation.engine, job_finished.evaluation.failure, job_finished.best) == ("torch", said, None)
    assert job_finished.accuracy == plain.finish().accuracy
    assert JobResult.of("tiny", coordinator.open(), rounds, job_finished).evaluation == job_finished.evaluation


@pytest.mark.slow
@pytest.mark.parametrize("last", [0.0, math.nan])
def test_a_loss_that_is_no_number_is_never_the_best_and_can_be_read_again(
    last: float, document: dict[str, Any], tmp_path: Path
) -> None:
    document["evaluation"] = {"whole_every": "round", "serve": "best"}
    job = a_job(document, tmp_path)
    found = (
        streaming(job).evaluate(blown_up(AdapterStack.new(range(1, 4), job.hidden, 8, 3, seed=0)), "test").predictions
    )
    assert not math.isfinite(float(found.losses.sum())), "as the model itself has it"
    _, rounds, _, job_finished = trained(job, tmp_path, [math.nan, 10, 20, math.nan, last])
    assert job_finished.best is not None
    assert (job_finished.best.round, job_finished.served) == (1, "best")
    log = CommitLog(tmp_path / "log")
    assert log.rounds() == rounds
    assert log.job_finished() == job_finished
    assert [record.evaluation.loss is None for record in rounds if record.evaluation] == [True, False, False, True]
    assert rounds[0].evaluation is not None
    assert "no finite number" in (rounds[0].evaluation.failure or "")
    assert (job_finished.loss is None) == math.isnan(last)
    result = JobResult.of("tiny", Coordinator(job, LocalPool(job.base), log).open(), rounds, job_finished)
    strict = json.dumps(result.model_dump(mode="json"), allow_nan=False)
    assert JobResult.model_validate_json(strict) == result


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_the_end_has_the_multiple_choice_too(fails: bool, document: dict[str, Any], tmp_path: Path) -> None:
    folder, data, questions = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "choices.jsonl"
    causal_folder("llama", folder)
    data.write_text("\n".join(json.dumps({"text": f"row {row} of many"}) for row in range(40)))
    rows = [{"prompt": f"{row}? ", "choices": ["ab", "c", "def"], "answer": row % 3} for row in range(9)]
    questions.write_text("\n".join(map(json.dumps, rows)))
    document |= {"model": {"base": f"path:{folder}", "task": "causal-lm"}, "data": {"train": f"path:{data}"}}
    document["data"]["max_length"] = 32
    document["chain"] = {"window": 1, "start": 0, "adapter": {"bottleneck": 8}}
    document["evaluation"] = {"choices": f"path:{questions}"}
    job = a_job(document, tmp_path)
    assert job.choices is not None
    stack = a_causal_stack(folder).stack
    plain = streaming(job)
    expected = job.choices.accuracy(plain.evaluate(stack, "choices").predictions.losses)
    # The first thing that is asked of it is the multiple choice, and then come the rows.
    found = ServerEvaluation(job, Moody(plain, [0, None] if fails else [0, 0])).test(stack)
    assert (found.engine, found.failure is None) == (("torch", False) if fails else ("moody", True))
    assert found.choice_accuracy == expected
    assert 0 < expected < 1
    assert found.loss == pytest.approx(Score.of(plain.evaluate(stack, "test").predictions).loss)


@pytest.mark.slow
def test_an_early_exit_that_is_no_number_ends_no_stage(document: dict[str, Any], tmp_path: Path) -> None:
    """Nor does it differ from one that was read from the log."""
    document["rounds"]["convergence"] = {"span": 1, "minimum": 1, "threshold": 0}

    class Blown(ServerEvaluation):
        def early_exit(self, stack: AdapterStack, window: Any) -> Any:
            return super().early_exit(blown_up(stack), window)

    job = a_job(document, tmp_path)
    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log"), Blown(job, streaming(job)))
    rounds = list(coordinator.rounds())
    assert rounds
    assert all(record.held_out_loss is None for record in rounds)
    assert CommitLog(tmp_path / "log").rounds() == rounds


@pytest.mark.slow
def test_without_an_early_exit_a_job_is_trained_all_the_same(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"]["convergence"] = {"rule": "none"}
    finished = []
    for every in ("round", "never"):
        document["evaluation"] = {"every": every, "whole_every": "never"}
        job = a_job(document, tmp_path / every)
        coordinator = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / every / "log"))
        rounds = list(coordinator.rounds())
        for record in rounds:
            assert (record.held_out_loss is None) == (record.early_exit is None) == (every == "never")
            if record.early_exit and record.early_exit.peak_bytes is not None:
                assert record.early_exit.planned_bytes > 0
        finished.append(coordinator.stack().tensors())
        assert coordinator.finish().best is None
    assert_same(*finished)


@pytest.mark.parametrize(
    ("convergence", "evaluation", "said"),
    [
        (
            {},
            {"every": "never"},
            r"evaluation\.every is 'never'; expected .* while rounds\.convergence\.rule is plateau",
        ),
        ({"rule": "movement"}, {"every": "never"}, None),
        ({"rule": "none"}, {"every": "never"}, None),
        (
            {},
            {"whole_every": "never", "serve": "best"},
            r"evaluation\.serve is 'best'; expected 'last' while evaluation\.whole_every is never",
        ),
        (
            {},
            {"whole_every": "never", "choices": "path:some.jsonl"},
            r"evaluation\.choices is 'path:some\.jsonl'; expected no value while evaluation\.whole_every is never",
        ),
        ({}, {"workers": 2}, r"evaluation\.workers is 2; expected 1 while evaluation\.engine is torch"),
        ({}, {"workers": 2, "engine": "deepspeed"}, None),
        ({}, {"workers": 1, "whole_every": "never"}, None),
    ],
)
def test_what_is_asked_for_in_vain_is_refused(
    convergence: dict[str, Any], evaluation: dict[str, Any], said: str | None, document: dict[str, Any]
) -> None:
    document["rounds"]["convergence"] = convergence
    document["evaluation"] = evaluation
    if said is None:
        assert parse_job(document).evaluation.workers == evaluation.get("workers", 1)
        return
    with pytest.raises(InvalidJob, match=said):
        parse_job(document)


def test_a_server_streams_layers_that_are_large() -> None:
    most, mib = server.SERVER_LAYERS, 2**20
    assert server.evaluation_weights(most // 2, 0, 3) == ("resident", "resident")
    assert server.evaluation_weights(most // 2, 1, 2) == ("streamed", "resident")
    assert server.evaluation_weights(most // 2, 0, 4) == ("resident", "streamed")
    assert server.evaluation_weights(386 * mib, 0, 1)[0] == "streamed", "LLaMA2-7B"
    assert server.evaluation_weights(49 * mib, 0, 3) == ("resident", "resident"), "RoBERTa-large"


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What was planned and measured for an encoder and for a language model, with layers in memory and without."""
    command = [sys.executable, "-m", "tests.evaluated", str(tmp_path_factory.mktemp("evaluated")), "bert", "llama"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_server_keeps_to_its_plan_with_layers_and_without(family: str, evaluations: list[dict[str, Any]]) -> None:
    resident, streamed = (found for found in evaluations if found["family"] == family)
    for found in (resident, streamed):
        for key in ("early_exit", "whole"):
            planned, peak = found[key]
            assert peak is None or peak <= planned <= peak * 4 / 3
        assert found["process"] is None or found["process"] > found["whole"][1]
    layer = 12 * 1024**2 * 4  # about: four matrices [1024, 1024], and more of [1024, 4096]
    for key in ("early_exit", "whole"):
        assert resident[key][0] > 2 * layer
        assert streamed[key][0] < resident[key][0] - 1.5 * layer
    assert streamed["losses"] == pytest.approx(resident["losses"], rel=1e-5)
    assert streamed["losses"][0] != pytest.approx(0)


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


@pytest.mark.slow
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_macro_f1_is_the_mean_over_classes_that_occur(pairs: list[tuple[int, int]]) -> None:
    labels, found = (torch.tensor(values) for values in zip(*pairs, strict=True))
    whole = Predictions.blank(len(pairs))
    scores = []
    for name in {value for pair in pairs for value in pair}:
        hits = sum(pair == (name, name) for pair in pairs)
        misses = sum((name in pair) and pair != (name, name) for pair in pairs)
        scores.append(2 * hits / (2 * hits + misses))
    assert macro_f1(replace(whole, classes=found), labels.numpy()) == pytest.approx(sum(scores) / len(scores))
