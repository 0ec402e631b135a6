"""Who judges the whole model with a stack on it. The coordinator sees an ``Evaluator`` and never knows which."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from chainfed_ray.data.tokens import Examples
from chainfed_ray.evaluation.predictions import Predictions
from chainfed_ray.model.adapters import AdapterStack

EvaluationSets = Mapping[str, Examples]
"""What an evaluator judges stacks on, by name."""


def whole_model(examples: str) -> str:
    """What goes on while an evaluator judges a stack on the set called ``examples``, in words."""
    return f"evaluating the whole model ({examples})"


@dataclass(frozen=True)
class Evaluated:
    """The judgement of a set's examples, in their order, and what it took.

    ``seconds`` are from asking to the answer, ``forward_seconds`` those of the forward passes alone. Memory is that of the
    largest of the evaluator's ``processes``: ``planned_bytes`` and ``peak_bytes`` are what it may take and took above itself
    when idle, ``process_bytes`` all that it took, libraries included; None if not known.
    """

    judgement: Predictions
    seconds: float
    forward_seconds: float
    planned_bytes: int | None = None
    peak_bytes: int | None = None
    process_bytes: int | None = None
    processes: int = 1


class Evaluator(Protocol):
    """Holds the held-out examples of one job, and judges the base model with any stack on them."""

    engine: str  # what it is called in a job's record

    def evaluate(self, stack: AdapterStack, examples: str) -> Evaluated:
        """Judge the whole model, all its layers, with ``stack`` on the set called ``examples``.

        Raises:
            EvaluationFailed: it could not; the next stack may be judged all the same.
        """
        ...

    def close(self) -> None:
        """Let go of the model, its processes and its files."""
        ...
