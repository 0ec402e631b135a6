"""The evaluator that streams the model: it runs all examples through one layer after the other.

At most two layers are in memory at once: one computes while the next is loaded. If the layers are large, only slices of their
matrices are in memory.
"""

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
    """An ``Evaluator`` in this process.

    The layers below the lowest adapter never change. They run once, and their output is kept in ``base.scratch``.
    """

    engine = "torch"

    def __init__(
        self, base: ModelSource, memory: MemoryProfile, sets: EvaluationSets, listen: Listener = no_listener
    ) -> None:
        self._base, self._memory, self._sets, self._listen = base, memory, sets, listen

    def evaluate(self, stack: AdapterStack, examples: str) -> Evaluated:
        """See ``Evaluator``. Errors, such as that of a full disk, are raised unchanged, not as ``EvaluationFailed``."""
        chosen, last = self._sets[examples], self._memory.layers - 1
        started = perf_counter()
        with PeakMemory() as peak, one_thread():
            # The whole model is the early exit at its last layer.
            cache = self._base.scratch / f"({examples})"
            reporter = Reporter(whole_model(examples), self._listen)
            predictions = predict_early_exit(chosen, self._base, cache, stack, Window(last, last), reporter)
        seconds = perf_counter() - started
        planned = evaluation_bytes(self._memory, len(stack.layers), 1, int(chosen.lengths.max()))
        return Evaluated(predictions, seconds, seconds, planned, peak.bytes, peak.highest)

    def close(self) -> None:
        """Do nothing: no model is held between evaluations, and the job deletes its scratch folder with the caches."""
