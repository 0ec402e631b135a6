"""FedAvg: the mean of the clients' tensors, weighted by example count (McMahan et al., 2017).

Updates are added as they arrive, and the mean has the same bits in any order: what is added are whole numbers
(``fixed_point.py``). The server holds one update and the sums, however many clients there are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from chainfed_ray.aggregation.fixed_point import MOST_CHANGE, FixedPoint, FixedPointSums, beyond
from chainfed_ray.model.adapters import Tensors, change, rank_axis


class RunningMean:
    """A weighted mean of named tensors, to which updates are added one by one, in any order.

    Changes from ``start`` are summed as integers. ``examples`` is the most that the weights of all updates add up to. An entry
    may change by ``MOST_CHANGE``; an update that goes further is ``impossible``. So the mean's change is at most 2^-(f + 1)
    from the exact one, before it is rounded to float32, where f is ``fraction_bits``: 37 with a hundred thousand examples.
    What float64 itself rounds off is less than 2^-43.

    A tensor's mean is over the updates that have it: clients with less memory train fewer adapters.
    """

    def __init__(self, start: Mapping[str, Tensor], examples: int) -> None:
        self._start = start
        self._sums = FixedPointSums(FixedPoint(MOST_CHANGE, examples))

    @property
    def fraction_bits(self) -> int:
        """See ``Aggregate``."""
        return self._sums.form.fraction_bits

    def impossible(self, tensors: Mapping[str, Tensor]) -> str | None:
        """See ``Aggregate``: an entry has changed too much to be summed."""
        return beyond(self._start, tensors, MOST_CHANGE)

    def add(self, place: int, tensors: Mapping[str, Tensor], examples: int) -> None:
        """Add an update, weighted by its example count. The ``place`` of its client makes no difference."""
        for name, tensor in tensors.items():
            self._sums.add(name, change(self._start[name], tensor), examples)

    def merge(self, other: "RunningMean") -> None:
        """Add the updates of ``other``, the mean of another part of the same round.

        Raises:
            ValueError: it was made for another number of examples.
        """
        self._sums.merge(other._sums)

    def result(self) -> Tensors:
        """The mean by name, in float32; a tensor that no update had is not in it."""
        return {
            name: self._sums.total(name).div_(weight).add_(self._start[name]).float()
            for name, weight in self._sums.weights.items()
        }


class MeanByRank:
    """The weighted mean in which each rank of a LoRA is averaged over the updates that have it: of some, the first ranks alone.

    What an update lacks counts as no change, with no weight. The sums are those of a ``RunningMean`` over single ranks.
    """

    def __init__(self, start: Tensors, examples: int) -> None:
        self._start = start
        self._mean = RunningMean(_single_ranks(start), examples)

    @property
    def fraction_bits(self) -> int:
        """See ``Aggregate``."""
        return self._mean.fraction_bits

    def impossible(self, tensors: Mapping[str, Tensor]) -> str | None:
        """See ``Aggregate``."""
        return self._mean.impossible(_single_ranks(tensors))

    def add(self, place: int, tensors: Mapping[str, Tensor], examples: int) -> None:
        """Add an update, which may have the first ranks of its LoRAs alone."""
        self._mean.add(place, _single_ranks(tensors), examples)

    def result(self) -> Tensors:
        """The mean by name. Ranks that no update had are as they were; a tensor of which none had any is not in it."""
        found = self._mean.result()
        whole = Tensors()
        for name, start in self._start.items():
            axis, ranks = rank_axis(name), _single_ranks({name: start})
            if any(rank in found for rank in ranks):
                parts = [found.get(rank, tensor) for rank, tensor in ranks.items()]
                whole[name] = parts[0] if axis is None else torch.stack(parts, axis)
        return whole


def _single_ranks(tensors: Mapping[str, Tensor]) -> Tensors:
    """Each rank of each LoRA by a name of its own; other tensors as they are."""
    single = Tensors()
    for name, tensor in tensors.items():
        axis = rank_axis(name)
        parts = [] if axis is None else tensor.unbind(axis)
        single |= (
            {f"{name}:{place}": part.contiguous() for place, part in enumerate(parts)} if parts else {name: tensor}
        )
    return single
