"""The evaluator that streams: layer after layer over all examples, two layers in memory or, if they are large, slices."""

from time import perf_counter

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.server import evaluation_bytes
from chainfed_ray.chain import Window
from chainfed_ray.device.peak import PeakMemory
from chainfed_ray.device.threads import one_thread
from chainfed_ray.evaluation.early_exit import predict_early_exit
from chainfed_ray.evaluation.evaluator import Evaluated, EvaluationSets, whole_model
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.source import ModelSource


class StreamingEvaluator:
    """An ``Evaluator`` in this process. What is below the lowest adapter runs once, and is kept in ``base.scratch``."""

    engine = "torch"

    def __init__(
        self, base: ModelSource, costs: MemoryProfile, sets: EvaluationSets, listen: Listener = no_listener
    ) -> None:
        self._base, self._costs, self._sets, self._listen = base, costs, sets, listen

    def evaluate(self, stack: AdapterStack, examples: str) -> Evaluated:
        """See ``Evaluator``. Whatever goes wrong, such as a disk that is full, is raised as it is."""
        chosen, last = self._sets[examples], self._costs.layers - 1
        started = perf_counter()
        with PeakMemory() as peak, one_thread():
            # The output of the last layer, and nothing of the model after it: the whole model is a cut at its end.
            cache = self._base.scratch / f"({examples})"
            reporter = Reporter(whole_model(examples), self._listen)
            judgement = predict_early_exit(chosen, self._base, cache, stack, Window(last, last), reporter)
        seconds = perf_counter() - started
        planned = evaluation_bytes(self._costs, len(stack.layers), 1, int(chosen.lengths.max()))
        return Evaluated(judgement, seconds, seconds, planned, peak.bytes, peak.highest)

    def close(self) -> None:
        """Nothing is held between evaluations; the caches go with the job's scratch folder."""
