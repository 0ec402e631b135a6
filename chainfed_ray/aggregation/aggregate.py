"""How the updates of a round become one: the protocol ``Aggregate``, and the aggregate of the rule that a job names.

A mean takes each update as it arrives (``mean.py``). Other rules need all updates of a round at once (``robust.py``), which are
kept for them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Protocol

from torch import Tensor

from chainfed_ray.aggregation.fixed_point import MOST_CHANGE, beyond
from chainfed_ray.aggregation.mean import MeanByRank, RunningMean
from chainfed_ray.aggregation.robust import krum, median, trimmed_mean
from chainfed_ray.aggregation.rule import AggregationRule, WeightedUpdate
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.spec.sections import AggregationSpec


class Aggregate(Protocol):
    """Takes the updates of a round one by one, in any order, and gives their aggregate. The order changes no bit of it."""

    @property
    def fraction_bits(self) -> int | None:
        """f, if changes are summed as whole multiples of 2^-f; None if updates are not summed."""
        ...

    def impossible(self, tensors: Mapping[str, Tensor]) -> str | None:
        """The reason why an update cannot be taken, or None if it can."""
        ...

    def add(self, place: int, tensors: Mapping[str, Tensor], examples: int) -> None:
        """Take the update of the client at ``place`` in the round, and its example count."""
        ...

    def result(self) -> Tensors:
        """The aggregate by name; a tensor that does not change is not in it."""
        ...


def aggregate_by(spec: AggregationSpec, start: Tensors, examples: int, by_rank: bool = False) -> Aggregate:
    """An empty aggregate by the job's rule.

    ``start`` are the tensors that are trained, as they were sent. ``examples`` is the number of all sampled clients' examples.
    ``by_rank``: some clients train fewer ranks of LoRAs than others; only the mean allows this.
    """
    match spec.rule:
        case "mean":
            return MeanByRank(start, examples) if by_rank else RunningMean(start, examples)
        case "median":
            return KeptUpdates(start, median)
        case "trimmed-mean":
            return KeptUpdates(start, partial(trimmed_mean, trim=spec.trim))
        case "krum":
            return KeptUpdates(start, partial(krum, byzantine=spec.byzantine))


class KeptUpdates:
    """Keeps all updates of a round in memory, for a ``rule`` that needs them at once. It gets them in the order of places.

    They have changed from ``start`` by no more than the mean takes. So no rule that adds them up comes near float32's range,
    and one client cannot end a job by numbers at its edge.
    """

    fraction_bits = None

    def __init__(self, start: Mapping[str, Tensor], rule: AggregationRule) -> None:
        self._start, self._rule = start, rule
        self._updates: dict[int, WeightedUpdate] = {}

    def impossible(self, tensors: Mapping[str, Tensor]) -> str | None:
        """See ``Aggregate``: an entry has changed more than training changes it."""
        return beyond(self._start, tensors, MOST_CHANGE)

    def add(self, place: int, tensors: Mapping[str, Tensor], examples: int) -> None:
        """Keep an update."""
        self._updates[place] = (tensors, examples)

    def result(self) -> Tensors:
        """The rule's aggregate; nothing if there were no updates."""
        return self._rule([self._updates[place] for place in sorted(self._updates)]) if self._updates else {}
