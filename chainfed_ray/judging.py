"""What the server judges of a job's stacks, and when: the chain cut at the window's top, and the whole model.

Each prefix of a chain is a smaller model, so the cut is judged as what it is, an early exit. The whole model is judged by an
``Evaluator``; whatever goes wrong there is noted, and costs the job nothing else.
"""

from collections.abc import Sequence

from chainfed_ray.adapter import AdapterStack
from chainfed_ray.chain import Window
from chainfed_ray.evaluate import evaluate
from chainfed_ray.evaluator import Evaluated, Evaluator, Sets
from chainfed_ray.job import Job
from chainfed_ray.records import Best, Evaluation, Round
from chainfed_ray.score import Score, macro_f1
from chainfed_ray.sections import Often
from chainfed_ray.stream_evaluator import StreamEvaluator
from chainfed_ray.threads import one_thread

_VALIDATION, _TEST, _CHOICES = "validation", "test", "choices"


def sets_of(job: Job) -> Sets:
    """What an evaluator of ``job`` judges stacks on."""
    choices = {_CHOICES: job.choices.examples} if job.choices else {}
    return {_VALIDATION: job.validation, _TEST: job.test, **choices}


def streaming(job: Job) -> StreamEvaluator:
    """The evaluator that needs nothing but torch."""
    return StreamEvaluator(job.base, job.planner.costs, sets_of(job))


def streamed(job: Job) -> "Judging":
    """The judgements of ``job`` by that evaluator."""
    return Judging(job, streaming(job))


def is_due(often: Often, round_index: int, stage_ends: bool) -> bool:
    """Whether something that is to be done so often is due after a round; the end of a stage is always one."""
    return stage_ends or often == "round" or (isinstance(often, int) and (round_index + 1) % often == 0)


def best_round(rounds: Sequence[Round]) -> Round | None:
    """The one after which the whole model had the least held-out loss; of equals the newest. None if it was never judged."""
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


class Judging:
    """The judgements of one job. ``instead`` says why the evaluator is another than the job asks for, if it is."""

    def __init__(self, job: Job, evaluator: Evaluator, instead: str | None = None) -> None:
        self._job, self._evaluator, self._instead = job, evaluator, instead

    @property
    def evaluator(self) -> str:
        """What judges the whole model, in words."""
        return self._evaluator.engine + (f" ({self._instead})" if self._instead else "")

    def close(self) -> None:
        """Let go of the evaluator."""
        self._evaluator.close()

    def early_exit(self, stack: AdapterStack, window: Window) -> Score:
        """Of the chain cut at the top of ``window``, on the validation rows."""
        with one_thread():
            cache = self._job.base.scratch / f"({_VALIDATION})"
            return Score.of(evaluate(self._job.validation, self._job.base, cache, stack, window))

    def whole(self, stack: AdapterStack) -> Evaluation:
        """Of the whole model, on the validation rows and a test of multiple choice, if there is one; or why there is none."""
        try:
            choices = self._evaluator.judge(stack, _CHOICES) if self._job.choices else None
            return self._record(self._evaluator, self._evaluator.judge(stack, _VALIDATION), _VALIDATION, choices)
        except Exception as error:  # whatever goes wrong costs this judgement only, and is on record
            return Evaluation(engine=self._evaluator.engine, failure=f"{type(error).__name__}: {error}")

    def test(self, stack: AdapterStack) -> Evaluation:
        """Of the whole model, on the test rows: by the streaming evaluator where the job's own cannot."""
        failure = None
        if self._evaluator.engine != StreamEvaluator.engine:
            try:
                return self._record(self._evaluator, self._evaluator.judge(stack, _TEST), _TEST, None)
            except Exception as error:  # see above
                failure = f"{type(error).__name__}: {error}"
        streamer = streaming(self._job)
        record = self._record(streamer, streamer.judge(stack, _TEST), _TEST, None)
        return record.model_copy(update={"failure": failure or self._instead})

    def _record(self, by: Evaluator, found: Evaluated, name: str, choices: Evaluated | None) -> Evaluation:
        score, job = Score.of(found.judgement), self._job
        labels = (job.test if name == _TEST else job.validation).labels
        peaks = [one.peak_bytes for one in (found, choices) if one and one.peak_bytes is not None]
        return Evaluation(
            engine=by.engine,
            loss=score.loss,
            accuracy=score.accuracy,
            macro_f1=macro_f1(found.judgement, labels) if job.class_count is not None else None,
            perplexity=score.perplexity if job.class_count is None else None,
            choice_accuracy=job.choices.accuracy(choices.judgement.losses) if job.choices and choices else None,
            seconds=found.seconds + (choices.seconds if choices else 0),
            forward_seconds=found.forward_seconds + (choices.forward_seconds if choices else 0),
            planned_bytes=found.planned_bytes,
            peak_bytes=max(peaks, default=None),
            failure=self._instead,
        )


def _loss(record: Round) -> float:
    assert record.evaluation is not None
    assert record.evaluation.loss is not None
    return record.evaluation.loss
