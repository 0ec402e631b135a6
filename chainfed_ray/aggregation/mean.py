"""FedAvg: the mean of the clients' tensors, weighted by example count, in client order (McMahan et al., 2017).

Floating-point addition is not associative, so the order matters. Updates are added in the order of the clients in the round,
not of their arrival, so that the result is the same each time. They are added one at a time to a sum in float64, so that the
server holds one update and not all. Other rules need all updates of a round (``robust.py``).
"""

import reprlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from chainfed_ray.aggregation.robust import krum, median, trimmed_mean
from chainfed_ray.aggregation.rule import AggregationRule, WeightedUpdate
from chainfed_ray.errors import InvalidJob, InvalidUpdate
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.spec.sections import AggregationSpec

_MOST_CLAIMED = 2**60  # seconds, steps or bytes


def check_update(client: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], examples: int) -> None:
    """Refuse an update that must not be averaged. ``expected`` has the names, shapes and dtypes that the client must send.

    Raises:
        InvalidUpdate: a name, a shape or a dtype is not the expected one, a value is not finite, or no example was used.
    """
    if examples < 1:
        raise InvalidUpdate(client, f"its weight is {examples} examples")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InvalidUpdate(client, f"{missing[0]} is missing")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise InvalidUpdate(client, f"{unknown[0]} was not to be trained")
    for name, wanted in expected.items():
        found = tensors[name]
        if type(found) is not Tensor or found.requires_grad:
            raise InvalidUpdate(client, f"{name} is a {type(found).__name__}, not a plain tensor")
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise InvalidUpdate(
                client, f"{name} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
            )
        if not torch.isfinite(found).all():
            raise InvalidUpdate(client, f"{name} is not finite")


def check_claims(client: str, peak_bytes: object, **claims: object) -> None:
    """Refuse an update whose reported numbers, the ``claims``, are negative, no numbers or so large that none can be true.

    Sums of claims are on record, so each must be finite by far. ``peak_bytes`` may be None: not every kernel measures it.

    Raises:
        InvalidUpdate: a claim is something else; it names the claim.
    """
    if peak_bytes is not None:
        claims["peak_bytes"] = peak_bytes
    for what, value in claims.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < _MOST_CLAIMED:  # type: ignore[operator]
            raise InvalidUpdate(client, f"its {what} is {reprlib.repr(value)}")


def check_aggregate(rule: str, aggregate: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Refuse the aggregate of the caller's own rule if the ``trained`` tensors cannot be replaced by it.

    Raises:
        InvalidJob: a name, a shape or a dtype is not that of a ``trained`` tensor, or a value is not finite.
    """
    for name, found in aggregate.items():
        wanted = trained.get(name)
        if wanted is None:
            raise InvalidJob.at("aggregation", rule, f"a rule that gives tensors of the window only; it gave {name}")
        if found.shape != wanted.shape or found.dtype != wanted.dtype or not torch.isfinite(found).all():
            expected = f"a rule that gives {name} as finite {wanted.dtype} {list(wanted.shape)}"
            raise InvalidJob.at("aggregation", rule, f"{expected}; it gave {found.dtype} {list(found.shape)}")


class Aggregate(Protocol):
    """Takes the updates of a round one by one, in client order, and gives their aggregate."""

    def add(self, tensors: Mapping[str, Tensor], examples: int) -> None:
        """Take an update and its example count."""
        ...

    def result(self) -> Tensors:
        """The aggregate by name; a tensor that does not change is not in it."""
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
    """A weighted mean of named tensors, to which updates are added one by one.

    A tensor's mean is over the updates that have it: clients with less memory train fewer adapters.
    """

    def __init__(self) -> None:
        self._sums: Tensors = {}
        self._weights: Counter[str] = Counter()

    def add(self, tensors: Mapping[str, Tensor], examples: int) -> None:
        """Add an update, weighted by its example count."""
        for name, tensor in tensors.items():
            weighted = tensor.double() * examples
            self._sums[name] = self._sums[name].add_(weighted) if name in self._sums else weighted
            self._weights[name] += examples

    def result(self) -> Tensors:
        """The mean by name, in float32; a tensor that no update had is not in it."""
        return {name: (total / self._weights[name]).float() for name, total in self._sums.items()}


class KeptUpdates:
    """Keeps all updates of a round, for a ``rule`` that needs them at once."""

    def __init__(self, rule: AggregationRule) -> None:
        self._rule = rule
        self._updates: list[WeightedUpdate] = []

    def add(self, tensors: Mapping[str, Tensor], examples: int) -> None:
        """Keep an update."""
        self._updates.append((tensors, examples))

    def result(self) -> Tensors:
        """The rule's aggregate; nothing if there were no updates."""
        return self._rule(self._updates) if self._updates else {}
