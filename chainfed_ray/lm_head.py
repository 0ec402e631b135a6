"""The loss of a language model whose head [V, D] is streamed by rows: logits [B, T, V] never exist at once.

One pass over the matrix gives both the loss and its gradient. For each slice of rows the logits of some vocabulary are made,
and folded into a running log-sum-exp and a running mean of the rows, weighted by their probability (the online softmax of
Milakov and Gimelshein, 2018, carried over to the gradient).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from chainfed_ray.blocks import Blocks
from chainfed_ray.stream import RowSlices


def next_token_loss(blocks: Blocks, hidden: Tensor, ids: np.ndarray, mask: Tensor, source: RowSlices) -> Tensor:
    """The cross-entropy in nats of each next token of ``ids`` [B, T], given the last layer's output ``hidden`` [B, T, D].

    It is the mean over an example's tokens, summed over the examples: a scalar. An example of one token has no next one.
    """
    finished = blocks.finish(hidden, mask)
    following = torch.zeros_like(mask)
    following[:, :-1] = mask[:, 1:]
    weights = following / following.sum(1, keepdim=True).clamp(min=1)
    targets = np.roll(ids, -1, axis=1).reshape(-1)
    return streamed_cross_entropy(
        finished.reshape(-1, finished.shape[-1]), targets, weights.reshape(-1), source, blocks.language_head
    )


def streamed_cross_entropy(
    hidden: Tensor, targets: np.ndarray, weights: Tensor, source: RowSlices, name: str
) -> Tensor:
    """Σ weight · cross-entropy in nats over N tokens: a scalar. Logits are hidden [N, D] · matrixᵀ [D, V], targets are [N].

    The matrix, called ``name``, is frozen. Sums are kept in float32, or in the dtype of ``hidden`` if that is wider.
    """
    loss: Tensor = _StreamedCrossEntropy.apply(hidden, targets, weights, source, name)  # type: ignore[no-untyped-call]
    return loss


class _StreamedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: np.ndarray, weights: Tensor, source: RowSlices, name: str) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        count, width = hidden.shape
        highest = torch.full((count, 1), -torch.inf, dtype=exact)
        total = torch.zeros(count, 1, dtype=exact)  # Σ exp(logit - highest)
        mean = torch.zeros(count, width, dtype=exact)  # Σ exp(logit - highest) · row
        right = torch.zeros(count, 1, dtype=exact)  # the logit of the target
        wanted = torch.zeros_like(hidden)  # the row of the target
        for first, rows in source.slices(name):
            logits = (hidden @ rows.T).to(exact)
            found = np.flatnonzero((targets >= first) & (targets < first + len(rows)))
            here, places = torch.from_numpy(found), torch.from_numpy(targets[found] - first)
            right[here] = logits[here, places].unsqueeze(1)
            wanted[here] = rows[places]
            before, highest = highest, torch.maximum(highest, logits.amax(1, keepdim=True))
            shrink = (before - highest).exp_()
            likely = logits.sub_(highest).exp_()
            total.mul_(shrink).add_(likely.sum(1, keepdim=True))
            # The product in the dtype of the rows, as the stock operations have it; the sum in the wider one.
            mean.mul_(shrink).add_(likely.to(rows.dtype) @ rows)
        weights = weights.to(exact).unsqueeze(1)
        ctx.save_for_backward(mean.div_(total).sub_(wanted).mul_(weights).to(hidden.dtype))
        return ((highest + total.log() - right) * weights).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (towards,) = ctx.saved_tensors
        return towards * gradients[0].to(towards.dtype), None, None, None, None
