"""What the server evaluates, and when: the chain's early exit, and the whole model.

The chain cut at the window's top is a smaller model by itself, an early exit: it is evaluated on the validation rows. With an
exact look-ahead nothing is cut, and the early exit is the model's end. The whole model is evaluated by an ``Evaluator``. If it
fails, the record says why and the job goes on.
"""

from collections.abc import Iterable
from time import perf_counter
from typing import Literal, Protocol

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.aggregation.checks import is_spent
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.server import evaluation_bytes
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Evaluating, Metrics
from chainfed_ray.client.pool import ClientPool, in_order
from chainfed_ray.client.turn import warm_up
from chainfed_ray.data.examples import most_held_out
from chainfed_ray.device.peak import PeakMemory
from chainfed_ray.device.threads import one_thread
from chainfed_ray.errors import EvaluationFailed
from chainfed_ray.evaluation.early_exit import predict_early_exit
from chainfed_ray.evaluation.evaluator import EvaluationSets, Evaluator
from chainfed_ray.evaluation.score import Score, ScoreSums, macro_f1
from chainfed_ray.evaluation.streaming_evaluator import StreamingEvaluator
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.source import ModelSource
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.rounds import ClientScore, EarlyExit, Evaluation, finite
from chainfed_ray.spec.sections import Often

_VALIDATION: Literal["validation"] = "validation"
_TEST: Literal["test"] = "test"
_CHOICES = "choices"
_TEST_TRIES = 3
_MOST_COUNTED = 2**50  # predictions, or their loss in nats


def sets_of(job: PlannedJob) -> EvaluationSets:
    """The examples on which the stacks of ``job`` are evaluated, by name."""
    choices = {_CHOICES: job.choices.examples} if job.choices else {}
    return {_VALIDATION: job.validation, _TEST: job.test, **choices}


def streaming(job: PlannedJob, listen: Listener = no_listener) -> StreamingEvaluator:
    """The evaluator that runs the model layer by layer in this process, in torch alone."""
    return StreamingEvaluator(job.base, job.planner.costs, sets_of(job), listen)


class MakeDiskEvaluator(Protocol):
    """Makes an evaluator that has its weights on disk and runs in ``workers`` processes, or says why it cannot run here."""

    def __call__(
        self, base: ModelSource, profile: MemoryProfile, sets: EvaluationSets, *, workers: int, listen: Listener
    ) -> Evaluator | str: ...


def server_evaluation(
    job: PlannedJob, listen: Listener = no_listener, *, on_disk: MakeDiskEvaluator
) -> "ServerEvaluation":
    """The evaluations of ``job`` with the engine that it names. ``on_disk`` may need more of the process, such as Ray.

    If it names DeepSpeed and that cannot run here, the torch engine streams the layers instead. The job's record says why.
    """
    # Early exits are evaluated in this process, and their peak memory is measured. Libraries allocate memory on first use,
    # so use them now: otherwise the first peak would include it.
    Reporter("warming up for evaluations", listen).begin()
    warm_up(job.base)
    wanted = job.spec.evaluation
    if wanted.engine == "torch":
        return streamed(job, listen)
    evaluator = on_disk(job.base, job.planner.costs, sets_of(job), workers=wanted.workers, listen=listen)
    if isinstance(evaluator, str):
        return ServerEvaluation(job, streaming(job, listen), f"in place of {wanted.engine}: {evaluator}", listen)
    return ServerEvaluation(job, evaluator, listen=listen)


def streamed(job: PlannedJob, listen: Listener = no_listener) -> "ServerEvaluation":
    """The server's evaluation of ``job`` with the streaming evaluator."""
    return ServerEvaluation(job, streaming(job, listen), listen=listen)


def is_due(often: Often | Literal["never"], round_index: int, stage_ends: bool) -> bool:
    """True if an evaluation is due after round ``round_index``, counted from 0.

    ``often`` is "never", "stage" (when a stage ends), "round", or a number of rounds. All but "never" include a stage's end.
    """
    if often == "never":
        return False
    return stage_ends or often == "round" or (isinstance(often, int) and (round_index + 1) % often == 0)


class JobEvaluation(Protocol):
    """Evaluates the stacks of one job. See ``ServerEvaluation`` for what each method does."""

    @property
    def evaluator(self) -> str: ...

    def close(self) -> None: ...

    def early_exit(self, stack: AdapterStack, window: Window) -> tuple[Score, EarlyExit]: ...

    def whole(self, stack: AdapterStack) -> Evaluation: ...

    def test(self, stack: AdapterStack) -> Evaluation: ...


class ServerEvaluation:
    """Evaluates the stacks of one job with ``evaluator``.

    If the job asks for another evaluator, ``instead`` says why it is not used. The records show that reason.
    """

    def __init__(
        self, job: PlannedJob, evaluator: Evaluator, instead: str | None = None, listen: Listener = no_listener
    ) -> None:
        self._job, self._evaluator, self._instead, self._listen = job, evaluator, instead, listen

    @property
    def evaluator(self) -> str:
        """The name of the evaluator of the whole model, with the reason if it is not the one that the job asks for."""
        return self._evaluator.engine + (f" ({self._instead})" if self._instead else "")

    def close(self) -> None:
        """Release what the evaluator holds."""
        self._evaluator.close()

    def early_exit(self, stack: AdapterStack, window: Window) -> tuple[Score, EarlyExit]:
        """The score of the chain cut at the top of ``window``, on the validation rows; and the time and memory it took."""
        job, rows, started = self._job, self._job.validation, perf_counter()
        planned = evaluation_bytes(job.planner.costs, len(stack.layers), len(window), int(rows.lengths.max()))
        with PeakMemory() as peak, one_thread():
            reporter = Reporter(f"evaluating the chain up to layer {window.top}", self._listen)
            found = predict_early_exit(rows, job.base, job.base.scratch / f"({_VALIDATION})", stack, window, reporter)
        seconds = perf_counter() - started
        return Score.of(found), EarlyExit(seconds=seconds, planned_bytes=planned, peak_bytes=peak.bytes)

    def whole(self, stack: AdapterStack) -> Evaluation:
        """Evaluate the whole model on the validation rows and, if the job has one, on its multiple-choice test.

        An evaluation that fails has no scores; its ``failure`` is the reason.
        """
        try:
            return self._evaluated(self._evaluator, stack, _VALIDATION, self._instead)
        except Exception as error:  # costs this evaluation only: the record has the reason, and the job goes on
            return Evaluation(engine=self._evaluator.engine, failure=f"{type(error).__name__}: {error}")

    def test(self, stack: AdapterStack) -> Evaluation:
        """Evaluate the whole model as ``whole`` does, but on the test rows.

        A job needs this score. So if the job's own evaluator fails, the streaming evaluator takes over.
        """
        instead = self._instead
        if self._evaluator.engine != StreamingEvaluator.engine:
            try:
                return self._evaluated(self._evaluator, stack, _TEST, instead)
            except Exception as error:  # as in ``whole``
                instead = f"{type(error).__name__}: {error}"
        return self._evaluated(streaming(self._job, self._listen), stack, _TEST, instead)

    def untuned(self) -> Evaluation:
        """Evaluate the base model alone on the test rows, to compare: new adapters change nothing."""
        job = self._job
        return self.test(AdapterStack.new(range(job.layers), job.hidden, 1, job.class_count, seed=0))

    def _evaluated(self, by: Evaluator, stack: AdapterStack, rows: str, instead: str | None) -> Evaluation:
        """The record of an evaluation by one evaluator, on the set ``rows`` and the choices.

        ``instead`` says why the job's own evaluator is not used; None if it is.
        """
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
            failure=f"its loss is {score.loss}, which is no finite number" if finite(score.loss) is None else instead,
        )


class FederatedEvaluation:
    """Evaluates the stacks of one job on the rows that clients at sites hold out. They do that in ``pool``, and send sums.

    A client that does not answer is left out. The record has the scores of each one that did.
    """

    evaluator = "sites"

    def __init__(self, job: PlannedJob, pool: ClientPool, listen: Listener = no_listener) -> None:
        self._job, self._pool, self._listen = job, pool, listen

    def close(self) -> None:
        """Do nothing: the pool is its caller's."""

    def early_exit(self, stack: AdapterStack, window: Window) -> tuple[Score, EarlyExit]:
        """See ``ServerEvaluation``. The score is NaN if no client answered."""
        started = perf_counter()
        total, metrics = self._sums(stack, window, _VALIDATION)
        planned = max((client.budget_bytes for client in self._job.clients), default=0)
        peak = _most(one.peak_bytes for one in metrics.values())
        return total.score, EarlyExit(seconds=perf_counter() - started, planned_bytes=planned, peak_bytes=peak)

    def whole(self, stack: AdapterStack) -> Evaluation:
        """See ``ServerEvaluation``."""
        return self._evaluated(stack, _VALIDATION)

    def test(self, stack: AdapterStack) -> Evaluation:
        """See ``ServerEvaluation``. A job needs this score, so clients are asked again if none of them answered.

        Raises:
            EvaluationFailed: no client answered.
        """
        for _ in range(_TEST_TRIES):
            found = self._evaluated(stack, _TEST)
            if found.accuracy is not None:
                return found
        raise EvaluationFailed(self.evaluator, "no client at a site answered; the rounds are kept")

    def _evaluated(self, stack: AdapterStack, rows: Literal["validation", "test"]) -> Evaluation:
        started, last = perf_counter(), self._job.layers - 1
        total, metrics = self._sums(stack, Window(last, last), rows)
        if not total.predictions:
            return Evaluation(engine=self.evaluator, failure="no client at a site sent scores")
        classifies = self._job.class_count is not None
        return Evaluation(
            engine=self.evaluator,
            loss=total.score.loss,
            accuracy=total.score.accuracy,
            macro_f1=total.macro_f1 if classifies else None,
            perplexity=None if classifies else total.score.perplexity,
            seconds=perf_counter() - started,
            forward_seconds=sum(one.cpu_seconds for one in metrics.values()),
            processes=len(metrics),
            peak_bytes=_most(one.peak_bytes for one in metrics.values()),
            clients=tuple(_client_score(client, one) for client, one in metrics.items()),
        )

    def _sums(
        self, stack: AdapterStack, window: Window, rows: Literal["validation", "test"]
    ) -> tuple[ScoreSums, dict[str, Metrics]]:
        """The sums over all clients that answered, and the answer of each, in their order."""
        spec, clients, order = self._job.spec, self._job.clients, Evaluating(stack.tensors(), window, rows)
        reporter = Reporter(f"evaluating at sites ({rows})", self._listen)
        outcomes = reporter.each(self._pool.run(clients, order, spec.rounds.deadline), len(clients), "clients")
        found: dict[str, Metrics] = {}
        for place, result in in_order(outcomes, len(clients)):
            most = most_held_out(spec.model, spec.data, clients[place].counts)
            if isinstance(result, Metrics) and _is_possible(result, self._job.class_count, most):
                found[clients[place].name] = result
        return ScoreSums.total((_sums_of(one) for one in found.values()), self._job.class_count), found


def _sums_of(metrics: Metrics) -> ScoreSums:
    return ScoreSums(metrics.examples, metrics.predictions, metrics.loss, metrics.correct, metrics.hits, metrics.occurs)


def _client_score(client: str, metrics: Metrics) -> ClientScore:
    score = _sums_of(metrics).score
    return ClientScore(client=client, examples=metrics.examples, loss=score.loss, accuracy=score.accuracy)


def _is_possible(metrics: Metrics, classes: int | None, most: int) -> bool:
    """True if at most so many predictions, ``most``, can have given these sums. So a client's weight is not what it claims.

    What a client says is checked, whatever its types.
    """
    if type(metrics.hits) is not tuple or type(metrics.occurs) is not tuple:
        return False
    if not is_spent(metrics.cpu_seconds, metrics.peak_bytes):
        return False
    counts = (metrics.examples, metrics.predictions, metrics.correct, *metrics.hits, *metrics.occurs)
    if not all(type(count) is int and 0 <= count < _MOST_COUNTED for count in counts):
        return False
    if max(metrics.predictions, metrics.examples) > most:
        return False
    if not isinstance(metrics.loss, float) or not 0 <= metrics.loss < _MOST_COUNTED:
        return False
    if classes is None:
        return metrics.correct <= metrics.predictions and not metrics.hits and not metrics.occurs
    whole = len(metrics.hits) == len(metrics.occurs) == classes and metrics.predictions == metrics.examples
    sums = sum(metrics.hits) == metrics.correct and sum(metrics.occurs) == 2 * metrics.examples
    each = all(2 * hits <= occurs for hits, occurs in zip(metrics.hits, metrics.occurs, strict=False))
    return whole and sums and each


def _most(counts: Iterable[int | None]) -> int | None:
    """The largest of the counts that were measured; None if none was."""
    return max((count for count in counts if count is not None), default=None)
