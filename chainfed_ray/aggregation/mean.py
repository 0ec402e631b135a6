"""FedAvg: the mean of the clients' tensors, weighted by example count, in client order (McMahan et al., 2017).

Floating-point addition is not associative, so the order matters: updates are folded by the client's place in the
round, never by their arrival, and the result is exact and repeatable. They are folded one at a time into a running
sum in float64, so the server holds one update and not all of them. Other rules need all of them (``robust.py``).
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from chainfed_ray.aggregation.robust import Rule, Weighed, krum, median, trimmed_mean
from chainfed_ray.errors import InvalidUpdate
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.spec.sections import AggregationSpec


def check_update(client: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], examples: int) -> None:
    """Refuse what must not be averaged.

    Raises:
        InvalidUpdate: a name, a shape or a dtype is not the expected one, a value is not finite, or no example was used.
    """
    if examples < 1:
        raise InvalidUpdate(client, f"it is weighted by {examples} examples")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InvalidUpdate(client, f"{missing[0]} is missing")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise InvalidUpdate(client, f"{unknown[0]} was not to be trained")
    for name, wanted in expected.items():
        found = tensors[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise InvalidUpdate(
                client, f"{name} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
            )
        if not torch.isfinite(found).all():
            raise InvalidUpdate(client, f"{name} is not finite")


class Aggregate(Protocol):
    """Takes the updates of a round, one at a time and in client order, and gives what they come to."""

    def fold(self, tensors: Mapping[str, Tensor], examples: int) -> None:
        """Take an update and its example count."""
        ...

    def result(self) -> Tensors:
        """The aggregate by name; nothing for a tensor that does not change."""
        ...


def aggregate_by(spec: AggregationSpec) -> Aggregate:
    """An empty aggregate by the job's rule."""
    match spec.rule:
        case "mean":
            return RunningMean()
        case "median":
            return KeptUpdates(median)
        case "trimmed-mean":
            return KeptUpdates(partial(trimmed_mean, trim=spec.trim))
        case "krum":
            return KeptUpdates(partial(krum, byzantine=spec.byzantine))


class RunningMean:
    """A weighted mean of named tensors, folded one update at a time. A tensor's mean is over the updates that have it."""

    def __init__(self) -> None:
        self._sums: Tensors = {}
        self._weights: Counter[str] = Counter()

    def fold(self, tensors: Mapping[str, Tensor], examples: int) -> None:
        """Add an update with the weight of its examples."""
        for name, tensor in tensors.items():
            weighted = tensor.double() * examples
            self._sums[name] = self._sums[name].add_(weighted) if name in self._sums else weighted
            self._weights[name] += examples

    def result(self) -> Tensors:
        """The mean by name, in float32; nothing for a tensor that no update had."""
        return {name: (total / self._weights[name]).float() for name, total in self._sums.items()}


class KeptUpdates:
    """The updates of a round, kept until there are all that ``rule`` looks at."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._updates: list[Weighed] = []

    def fold(self, tensors: Mapping[str, Tensor], examples: int) -> None:
        """Keep an update."""
        self._updates.append((tensors, examples))

    def result(self) -> Tensors:
        """What the rule makes of them."""
        return self._rule(self._updates)
