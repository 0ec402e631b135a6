"""What a classifier's head reads: means over the tokens, of the highest layers.

Ours, not the paper's, whose head reads one layer. What a text says is not all in the last one, and a linear classifier that
reads several is better without any training (Head2Toe: Evci et al., 2022). A layer below the window is frozen, so what is read
of it are D numbers an example, which come up with the hidden states.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LayerStates(NamedTuple):
    """How far examples are in the model: the hidden states of a layer, and what is read of the layers just below it."""

    hidden: Tensor  # [B, T, D]
    pooled: Tensor  # [B, r, D] float32, the lowest layer first


def no_features(hidden: Tensor) -> Tensor:
    """[B, 0, D]: what is read of the layers below the first one, whose inputs are ``hidden`` [B, T, D]."""
    return hidden.new_zeros(len(hidden), 0, hidden.shape[-1], dtype=torch.float32)


def mean_over_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, T, D] and [B, T] → [B, D], padding left out."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def append_pooled(pooled: Tensor, hidden: Tensor, mask: Tensor, most: int) -> Tensor:
    """``pooled`` [B, r, D] and after it the mean of a layer's output ``hidden`` [B, T, D]: the ``most`` highest of them."""
    if most == 0:
        return pooled
    return torch.cat([pooled, mean_over_tokens(hidden.float(), mask).unsqueeze(1)], 1)[:, -most:]
