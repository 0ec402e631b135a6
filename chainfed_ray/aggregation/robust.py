"""Robust aggregation: the median, the trimmed mean and Krum, which withstand some poisoned updates.

Each is a plain function of a round's updates, in the order of the clients. All three ignore the example counts, as in their
papers, since a hostile client could claim any count. Clients with less memory train fewer tensors, so each tensor is aggregated
over the updates that have it. The server holds all updates of a round until the last one is there, n times what a client sends.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from chainfed_ray.aggregation.rule import WeightedUpdate
from chainfed_ray.model.adapters import Tensors


def median(updates: Sequence[WeightedUpdate]) -> Tensors:
    """The median of each value (Yin et al., 2018, definition 1); of an even number, the mean of the middle two."""
    return _without_extremes(updates, lambda count: (count - 1) // 2)


def trimmed_mean(updates: Sequence[WeightedUpdate], trim: float) -> Tensors:
    """The mean of each value without the least and the greatest share ``trim`` in [0, 0.5) (Yin et al., 2018, definition 2).

    The share is rounded up to whole updates, so that a round with few updates still cuts some. The middle one or two values
    always stay, so the trimmed mean of two updates is their mean.
    """
    # 0.07 · 100 is slightly more than 7 in floating point; subtracting 1e-9 keeps it from being rounded up to 8.
    return _without_extremes(updates, lambda count: min(math.ceil(trim * count - 1e-9), (count - 1) // 2))


def krum(updates: Sequence[WeightedUpdate], byzantine: int) -> Tensors:
    """The most central update (Krum; Blanchard et al., 2017). It withstands f = ``byzantine`` poisoned updates.

    Among n updates, Krum chooses the update with the least sum of squared distances to its n − f − 2 nearest others. If several
    are equal, it takes the first.

    Clients may have trained windows of different widths. Each group of tensors that the same clients sent then has its own
    choice among these clients, by distances over all the tensors that they have in common. A tensor that fewer than 2f + 3
    clients sent is not in the result.
    """
    sent = [tensors for tensors, _ in updates]
    result: Tensors = {}
    for places, names in _by_senders(sent).items():
        if len(places) >= 2 * byzantine + 3:
            chosen = sent[places[_most_central([sent[place] for place in places], byzantine)]]
            result |= {name: chosen[name] for name in names}
    return result


def _without_extremes(updates: Sequence[WeightedUpdate], cut: Callable[[int], int]) -> Tensors:
    """For each tensor, the mean of each value without its ``cut(n)`` least and ``cut(n)`` greatest, among the n sent."""
    sent = [tensors for tensors, _ in updates]
    result: Tensors = {}
    for places, names in _by_senders(sent).items():
        count, extremes = len(places), cut(len(places))
        for name in names:
            values = torch.stack([sent[place][name] for place in places]).sort(dim=0).values  # [n, …]
            result[name] = values[extremes : count - extremes].double().mean(dim=0).float()
    return result


def _by_senders(sent: Sequence[Mapping[str, Tensor]]) -> dict[tuple[int, ...], list[str]]:
    """Group the tensor names by the updates that have them. The keys are the places of these updates."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in dict.fromkeys(name for tensors in sent for name in tensors):
        groups.setdefault(tuple(place for place, tensors in enumerate(sent) if name in tensors), []).append(name)
    return groups


def _most_central(sent: Sequence[Mapping[str, Tensor]], byzantine: int) -> int:
    """The place of the update that Krum chooses, the first of several with the least score."""
    shared = [name for name in sent[0] if all(name in tensors for tensors in sent)]
    distances = [[0.0] * len(sent) for _ in sent]
    for place, tensors in enumerate(sent):
        for other in range(place):
            squares = ((tensors[name].double() - sent[other][name].double()).square().sum() for name in shared)
            distances[place][other] = distances[other][place] = math.fsum(float(square) for square in squares)
    nearest = len(sent) - byzantine - 2
    others = (row[:place] + row[place + 1 :] for place, row in enumerate(distances))
    scores = [math.fsum(sorted(row)[:nearest]) for row in others]
    return scores.index(min(scores))
