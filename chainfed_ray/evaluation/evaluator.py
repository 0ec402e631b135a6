"""The ``Evaluator`` protocol: it evaluates the whole model with an adapter stack on held-out rows.

The coordinator knows this protocol only. Its implementations are ``StreamingEvaluator`` and the evaluator of
``cluster/offload``, which keeps the model on disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from chainfed_ray.data.tokens import Examples
from chainfed_ray.evaluation.predictions import Predictions
from chainfed_ray.model.adapters import AdapterStack

EvaluationSets = Mapping[str, Examples]
"""Sets of held-out examples by name, such as ``validation``. An evaluator is asked for one of them at a time."""


def whole_model(examples: str) -> str:
    """The words with which progress reports name an evaluation on the set called ``examples``."""
    return f"evaluating the whole model ({examples})"


@dataclass(frozen=True)
class Evaluated:
    """The predictions for a set's examples, in the order of the set, and what the evaluation cost.

    ``seconds`` is the time from the request to the answer; ``forward_seconds`` is the part spent in forward passes. The bytes
    are of the largest of the evaluator's ``processes``. ``planned_bytes`` and ``peak_bytes`` count what the process takes above
    its idle state: planned, and measured. ``process_bytes`` is the peak of the whole process, libraries included. A figure is
    None if it is not known.
    """

    predictions: Predictions
    seconds: float
    forward_seconds: float
    planned_bytes: int | None = None
    peak_bytes: int | None = None
    process_bytes: int | None = None
    processes: int = 1


class Evaluator(Protocol):
    """Evaluates the base model of one job, with any adapter stack, on the job's held-out examples."""

    engine: str  # the evaluator's name in a job's records

    def evaluate(self, stack: AdapterStack, examples: str) -> Evaluated:
        """Evaluate the whole model, all its layers, with ``stack`` on the set called ``examples``.

        Raises:
            EvaluationFailed: the evaluation did not succeed. A later call may.
        """
        ...

    def close(self) -> None:
        """Free the model, end its processes and delete its files."""
        ...
