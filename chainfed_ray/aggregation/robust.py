"""Aggregation that withstands some poisoned updates: the median, the trimmed mean and Krum.

Each is a plain function of the round's updates with their example counts, in client order. All three are unweighted, as in
their papers: a count is what a client's data comes to, and a liar would choose it. A tensor is aggregated over the
updates that have it, since a client with less memory trains fewer. All updates of a round are in memory at once.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from chainfed_ray.aggregation.rule import WeightedUpdate
from chainfed_ray.model.adapters import Tensors


def median(updates: Sequence[WeightedUpdate]) -> Tensors:
    """The median of each value (Yin et al., 2018, definition 1); of an even number, the mean of the two in the middle."""
    return _without_extremes(updates, lambda count: (count - 1) // 2)


def trimmed_mean(updates: Sequence[WeightedUpdate], trim: float) -> Tensors:
    """The mean of each value without the share ``trim`` in [0, 0.5) at each end (Yin et al., 2018, definition 2).

    The share is rounded up to whole updates, so that a round which lost some still cuts; one or two values in the middle
    always stay. Of two updates it is thus the mean.
    """
    # The small number: 0.07 · 100 is a little more than 7 in floating point, and 7 is meant.
    return _without_extremes(updates, lambda count: min(math.ceil(trim * count - 1e-9), (count - 1) // 2))


def krum(updates: Sequence[WeightedUpdate], byzantine: int) -> Tensors:
    """The update in the midst of the others (Blanchard et al., 2017); it withstands f = ``byzantine`` poisoned ones.

    Of n updates, it is the one with the least sum of squared distances to the n − f − 2 that are nearest to it; the first of
    equals. Where clients trained windows of different widths, this is decided anew for each group of tensors that the same
    clients sent: among these clients, with distances over all the tensors that they have in common. So nothing is taken
    that was not compared. A tensor that fewer than 2f + 3 clients sent is not in the result.
    """
    sent = [tensors for tensors, _ in updates]
    result: Tensors = {}
    for places, names in _by_senders(sent).items():
        if len(places) >= 2 * byzantine + 3:
            chosen = sent[places[_most_central([sent[place] for place in places], byzantine)]]
            # Copies: an update may lie in memory that is another's.
            result |= {name: chosen[name].clone() for name in names}
    return result


def _without_extremes(updates: Sequence[WeightedUpdate], cut: Callable[[int], int]) -> Tensors:
    """Tensor by tensor, the mean of each value without the ``cut(n)`` least and greatest of the n that were sent."""
    sent = [tensors for tensors, _ in updates]
    result: Tensors = {}
    for places, names in _by_senders(sent).items():
        count, extremes = len(places), cut(len(places))
        for name in names:
            values = torch.stack([sent[place][name] for place in places]).sort(dim=0).values  # [n, …]
            result[name] = values[extremes : count - extremes].double().mean(dim=0).float()
    return result


def _by_senders(sent: Sequence[Mapping[str, Tensor]]) -> dict[tuple[int, ...], list[str]]:
    """The names of the tensors that the same updates have, with the places of these updates."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in dict.fromkeys(name for tensors in sent for name in tensors):
        groups.setdefault(tuple(place for place, tensors in enumerate(sent) if name in tensors), []).append(name)
    return groups


def _most_central(sent: Sequence[Mapping[str, Tensor]], byzantine: int) -> int:
    """The place of the least score."""
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
