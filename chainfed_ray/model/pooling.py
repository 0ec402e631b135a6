"""Pooled features, the input of a classifier's head: the means over the tokens of the outputs of the highest layers.

The paper's head uses one layer; several are ours. The last layer does not hold all that a text says, and a linear classifier
over several layers is better without any training (Head2Toe: Evci et al., 2022). The layers below the window are frozen, so
their features, D numbers per example and layer, are computed once and accompany the hidden states.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class LayerStates(NamedTuple):
    """The states of examples at one layer: its output, and the pooled features of the layers just below it."""

    hidden: Tensor  # [B, T, D]
    pooled: Tensor  # [B, r, D] float32, the lowest layer first


def padded_together(parts: Sequence[LayerStates]) -> LayerStates:
    """The states of all ``parts`` of a batch, one part after the other, padded to the longest example."""
    longest = max(part.hidden.shape[1] for part in parts)
    hidden = torch.cat([pad(part.hidden, (0, 0, 0, longest - part.hidden.shape[1])) for part in parts])
    return LayerStates(hidden, torch.cat([part.pooled for part in parts]))


def no_features(hidden: Tensor) -> Tensor:
    """The pooled features below the first layer, whose input is ``hidden`` [B, T, D]: an empty tensor [B, 0, D]."""
    # `shape[0]` and not `len`, which would fix the number of examples in an exported graph
    return hidden.new_zeros(hidden.shape[0], 0, hidden.shape[-1], dtype=torch.float32)


def mean_over_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, T, D] and mask [B, T] → [B, D], without the padding."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def append_pooled(pooled: Tensor, hidden: Tensor, mask: Tensor, most: int) -> Tensor:
    """Append the mean over tokens of ``hidden`` [B, T, D] to ``pooled`` [B, r, D], and keep the ``most`` highest layers."""
    if most == 0:
        return pooled
    return torch.cat([pooled, mean_over_tokens(hidden.float(), mask).unsqueeze(1)], 1)[:, -most:]
