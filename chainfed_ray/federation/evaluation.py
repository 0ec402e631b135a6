"""What the server judges of a job's stacks, and when: the chain cut at the window's top, and the whole model.

Each prefix of a chain is a smaller model, so the cut is judged as what it is, an early exit. The whole model is judged by an
``Evaluator``; whatever goes wrong there is noted, and costs the job nothing else.
"""

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Literal

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.budget.server import evaluation_bytes
from chainfed_ray.chain import Window
from chainfed_ray.device.peak import PeakMemory
from chainfed_ray.device.threads import one_thread
from chainfed_ray.evaluation.early_exit import predict_early_exit
from chainfed_ray.evaluation.evaluator import EvaluationSets, Evaluator
from chainfed_ray.evaluation.score import Score, macro_f1
from chainfed_ray.evaluation.streaming_evaluator import StreamingEvaluator
from chainfed_ray.federation.prepare import PlannedJob
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.records.rounds import Best, EarlyExit, Evaluation, Restored, Round, finite
from chainfed_ray.spec.sections import Often

_VALIDATION, _TEST, _CHOICES = "validation", "test", "choices"


def sets_of(job: PlannedJob) -> EvaluationSets:
    """What an evaluator of ``job`` judges stacks on."""
    choices = {_CHOICES: job.choices.examples} if job.choices else {}
    return {_VALIDATION: job.validation, _TEST: job.test, **choices}


def streaming(job: PlannedJob, listen: Listener = no_listener) -> StreamingEvaluator:
    """The evaluator that needs nothing but torch."""
    return StreamingEvaluator(job.base, job.planner.costs, sets_of(job), listen)


def streamed(job: PlannedJob, listen: Listener = no_listener) -> "ServerEvaluation":
    """The judgements of ``job`` by that evaluator."""
    return ServerEvaluation(job, streaming(job, listen), listen=listen)


def is_due(often: Often | Literal["never"], round_index: int, stage_ends: bool) -> bool:
    """Whether something that is to be done so often is due after a round; the end of a stage is one, unless it is never."""
    if often == "never":
        return False
    return stage_ends or often == "round" or (isinstance(often, int) and (round_index + 1) % often == 0)


def best_round(rounds: Sequence[Round]) -> Round | None:
    """The one after which the whole model had the least held-out loss; of equals the newest.

    None if it was never judged; a loss that is no finite number is on no record.
    """
    judged = [record for record in rounds if record.evaluation and record.evaluation.loss is not None]
    return min(reversed(judged), key=_loss, default=None)


def best_of(rounds: Sequence[Round]) -> Best | None:
    """Which round's stack is the best one, and why."""
    record = best_round(rounds)
    if record is None or record.evaluation is None:
        return None
    last = next((other for other in reversed(rounds) if other.evaluation and other.evaluation.loss is not None), record)
    why = f"the whole model had the least held-out loss, {_loss(record):.4f}"
    if last.index != record.index:
        why += f"; after round {last.index + 1}, the last one judged, it had {_loss(last):.4f}"
    return Best(
        round=record.index, stage=record.stage, loss=_loss(record), accuracy=record.evaluation.accuracy, why=why
    )


def exits(rounds: Iterable[Round]) -> list[Restored]:
    """The early exits that were judged in a stage of these ``rounds``, in order: what it may go back to as it ends.

    The first is the stack that it began with, if its head was fitted. A loss that is no finite number is left out.
    """
    judged = list[tuple[int | None, float | None, float | None]]()
    for record in rounds:
        if fit := record.head_fit:
            judged.append((None, fit.held_out_loss, fit.accuracy))
        judged.append((record.index, record.held_out_loss, record.accuracy))
    return [
        Restored(round=index, loss=loss, accuracy=accuracy)
        for index, loss, accuracy in judged
        if loss is not None and accuracy is not None
    ]


def best_exit(judged: Sequence[Restored]) -> Restored | None:
    """The one with the least loss, of equals the newest; None if there is none."""
    return min(reversed(judged), key=lambda one: one.loss, default=None)


def stack_to_restore(judged: Sequence[Restored]) -> Restored | None:
    """What a stage with these exits goes back to as it ends; None if its newest exit is its best."""
    best = best_exit(judged)
    return None if best is None or best is judged[-1] else best


class ServerEvaluation:
    """The judgements of one job. ``instead`` says why the evaluator is another than the job asks for, if it is."""

    def __init__(
        self, job: PlannedJob, evaluator: Evaluator, instead: str | None = None, listen: Listener = no_listener
    ) -> None:
        self._job, self._evaluator, self._instead, self._listen = job, evaluator, instead, listen

    @property
    def evaluator(self) -> str:
        """What judges the whole model, in words."""
        return self._evaluator.engine + (f" ({self._instead})" if self._instead else "")

    def close(self) -> None:
        """Let go of the evaluator."""
        self._evaluator.close()

    def early_exit(self, stack: AdapterStack, window: Window) -> tuple[Score, EarlyExit]:
        """Of the chain cut at the top of ``window``, on the validation rows; and what it took."""
        job, rows, started = self._job, self._job.validation, perf_counter()
        planned = evaluation_bytes(job.planner.costs, len(stack.layers), len(window), int(rows.lengths.max()))
        with PeakMemory() as peak, one_thread():
            reporter = Reporter(f"evaluating the chain up to layer {window.top}", self._listen)
            found = predict_early_exit(rows, job.base, job.base.scratch / f"({_VALIDATION})", stack, window, reporter)
        return Score.of(found), EarlyExit(
            seconds=perf_counter() - started, planned_bytes=planned, peak_bytes=peak.bytes
        )

    def whole(self, stack: AdapterStack) -> Evaluation:
        """Of the whole model, on the validation rows and a test of multiple choice, if there is one; or why there is none."""
        try:
            return self._judged(self._evaluator, stack, _VALIDATION, self._instead)
        except Exception as error:  # whatever goes wrong costs this judgement only, and is on record
            return Evaluation(engine=self._evaluator.engine, failure=f"{type(error).__name__}: {error}")

    def test(self, stack: AdapterStack) -> Evaluation:
        """Of the whole model, as ``whole`` but on the test rows: by the streaming evaluator where the job's own cannot."""
        instead = self._instead
        if self._evaluator.engine != StreamingEvaluator.engine:
            try:
                return self._judged(self._evaluator, stack, _TEST, instead)
            except Exception as error:  # see above
                instead = f"{type(error).__name__}: {error}"
        return self._judged(streaming(self._job, self._listen), stack, _TEST, instead)

    def _judged(self, by: Evaluator, stack: AdapterStack, rows: str, instead: str | None) -> Evaluation:
        """Of the whole model by one evaluator, on ``rows`` and the multiple choice; ``instead`` is as in the class."""
        job = self._job
        choices = by.evaluate(stack, _CHOICES) if job.choices else None
        found = by.evaluate(stack, rows)
        both = (found, choices) if choices else (found,)
        score = Score.of(found.predictions)
        labels = (job.test if rows == _TEST else job.validation).labels
        return Evaluation(
            engine=by.engine,
            loss=score.loss,
            accuracy=score.accuracy,
            macro_f1=macro_f1(found.predictions, labels) if job.class_count is not None else None,
            perplexity=score.perplexity if job.class_count is None else None,
            choice_accuracy=job.choices.accuracy(choices.predictions.losses) if job.choices and choices else None,
            seconds=sum(one.seconds for one in both),
            forward_seconds=sum(one.forward_seconds for one in both),
            processes=found.processes,
            planned_bytes=_most(one.planned_bytes for one in both),
            peak_bytes=_most(one.peak_bytes for one in both),
            process_bytes=_most(one.process_bytes for one in both),
            failure=instead
            if finite(score.loss) is not None
            else f"its loss is {score.loss}, which is no finite number",
        )


def _most(counts: Iterable[int | None]) -> int | None:
    """The largest that is known."""
    return max((count for count in counts if count is not None), default=None)


def _loss(record: Round) -> float:
    assert record.evaluation is not None
    assert record.evaluation.loss is not None
    return record.evaluation.loss
