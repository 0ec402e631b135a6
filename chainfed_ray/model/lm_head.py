"""The loss of a language model whose head [V, D] is streamed by rows, so that logits [B, T, V] never exist at once.

One pass over the matrix gives both the loss and its gradient. Each slice of rows gives the logits of some of the vocabulary.
They update a running log-sum-exp, and a running mean of the rows weighted by their probability: the online softmax of Milakov
and Gimelshein (2018), extended to the gradient. ``LogitForm`` (how a family turns products into logits) is applied to each
slice, and its slope multiplies the probabilities before the rows are added.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.logit_form import LogitForm
from chainfed_ray.streaming.matrices import RowSlices


def next_token_loss(
    blocks: Blocks, hidden: Tensor, ids: np.ndarray, mask: Tensor, targets: np.ndarray, source: RowSlices
) -> Tensor:
    """The cross-entropy in nats of the ``targets`` [B, T] among the tokens ``ids`` [B, T], as a scalar.

    ``hidden`` [B, T, D] is the last layer's output, ``mask`` is [B, T]. Each target is predicted from the tokens before it. The
    loss is the mean over each example's targets, summed over the examples. An example without targets counts as 0.
    """
    following = _predicts_target(targets)
    places = np.flatnonzero(following)
    weights = (following / following.sum(1, keepdims=True).clip(min=1)).reshape(-1)[places]
    # Only positions that predict a target meet the head; the others, such as a prompt's, cost nothing here.
    states = blocks.finish(hidden, mask).reshape(-1, hidden.shape[-1]).index_select(0, torch.from_numpy(places))
    return streamed_cross_entropy(
        states, _next(ids)[places], torch.from_numpy(weights), source, blocks.language_head, blocks.logit_form
    )


@torch.no_grad()
def next_token_scores(
    blocks: Blocks, hidden: Tensor, ids: np.ndarray, mask: Tensor, targets: np.ndarray, source: RowSlices
) -> tuple[Tensor, Tensor]:
    """The losses and hits of each example, with the arguments of ``next_token_loss``.

    The losses [B] in float64 are cross-entropies in nats, summed over an example's targets. The hits [B] are the numbers of
    targets that the model finds the most likely token.
    """
    places = torch.from_numpy(np.flatnonzero(_predicts_target(targets)))
    finished = blocks.finish(hidden, mask)
    states, wanted = finished.reshape(-1, finished.shape[-1])[places], torch.from_numpy(_next(ids))[places]
    exact = torch.promote_types(states.dtype, torch.float32)
    highest = torch.full((len(states),), -torch.inf, dtype=exact)
    total = torch.zeros_like(highest)  # Σ exp(logit - highest)
    target_logit = torch.zeros_like(highest)
    likeliest = torch.zeros_like(wanted)
    for first, logits in logits_by_slices(blocks, states, source):
        here = ((wanted >= first) & (wanted < first + logits.shape[1])).nonzero().squeeze(1)
        target_logit[here] = logits[here, wanted[here] - first]
        top = logits.max(1)
        likeliest = torch.where(top.values > highest, top.indices + first, likeliest)
        before, highest = highest, torch.maximum(highest, top.values)
        total = total * (before - highest).exp_() + logits.sub_(highest.unsqueeze(1)).exp_().sum(1)
        del logits  # before the next slice's logits are made
    example = places // hidden.shape[1]
    missed = (highest + total.log() - target_logit).double()
    losses = torch.zeros(len(hidden), dtype=torch.float64).index_add_(0, example, missed)
    hits = torch.zeros(len(hidden), dtype=torch.int64).index_add_(0, example, (likeliest == wanted).long())
    return losses, hits


def logits_by_slices(blocks: Blocks, states: Tensor, source: RowSlices) -> Iterator[tuple[int, Tensor]]:
    """The logits of ``states`` [N, D], the output of ``Blocks.finish``: pairs of a slice's first token and its logits [N, v].

    They are in float32, or in the dtype of ``states`` if that is wider.
    """
    form = blocks.logit_form
    for first, rows in source.slices(blocks.language_head):
        yield first, _logits(states, first, rows, source, form)


def _logits(states: Tensor, first: int, rows: Tensor, source: RowSlices, form: LogitForm) -> Tensor:
    """The logits [N, v] of v tokens from ``first`` on; ``rows`` [v, D] are their rows of the head's matrix."""
    if form.bias is None:
        products = states @ rows.T
    else:
        products = torch.addmm(source.numbers(form.bias, first, len(rows)), states, rows.T)
    # Multiply in the dtype of the rows, as transformers does; everything after that is in the wider dtype.
    return form.apply(products.to(torch.promote_types(states.dtype, torch.float32)))


def _predicts_target(targets: np.ndarray) -> np.ndarray:
    """[B, T] bool: True at a position whose next token is a target."""
    following = np.roll(targets, -1, axis=1)
    following[:, -1] = False
    return following


def _next(ids: np.ndarray) -> np.ndarray:
    """The token after each of ``ids`` [B, T], as [B · T]. After an example's last token the value has no meaning."""
    return np.roll(ids, -1, axis=1).reshape(-1)


def streamed_cross_entropy(
    hidden: Tensor, targets: np.ndarray, weights: Tensor, source: RowSlices, name: str, form: LogitForm
) -> Tensor:
    """Σ weight · cross-entropy in nats over N tokens, a scalar; ``targets`` and ``weights`` are [N].

    Logits are ``form`` of the products hidden [N, D] · matrixᵀ [D, V]. The matrix, called ``name`` in ``source``, is frozen.
    Sums are in float32, or in the dtype of ``hidden`` if that is wider.
    """
    loss: Tensor = _StreamedCrossEntropy.apply(hidden, targets, weights, source, name, form)  # type: ignore[no-untyped-call]
    return loss


class _StreamedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: np.ndarray, weights: Tensor, source: RowSlices, name: str, form: LogitForm
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        count, width = hidden.shape
        highest = torch.full((count, 1), -torch.inf, dtype=exact)
        total = torch.zeros(count, 1, dtype=exact)  # Σ exp(logit - highest)
        mean = torch.zeros(count, width, dtype=exact)  # Σ exp(logit - highest) · slope · row
        target_logit = torch.zeros(count, 1, dtype=exact)
        wanted = torch.zeros_like(hidden)  # slope · row of the target
        for first, rows in source.slices(name):
            logits = _logits(hidden, first, rows, source, form)
            slope = form.slope(logits)
            found = np.flatnonzero((targets >= first) & (targets < first + len(rows)))
            here, places = torch.from_numpy(found), torch.from_numpy(targets[found] - first)
            target_logit[here] = logits[here, places].unsqueeze(1)
            wanted[here] = (rows[places] * form.slope(target_logit[here])).to(wanted.dtype)
            before, highest = highest, torch.maximum(highest, logits.amax(1, keepdim=True))
            shrink = (before - highest).exp_()
            likely = logits.sub_(highest).exp_()
            total.mul_(shrink).add_(likely.sum(1, keepdim=True))
            # Multiply in the dtype of the rows, as transformers does; sum in the wider dtype.
            mean.mul_(shrink).add_(likely.mul_(slope).to(rows.dtype) @ rows)
            del logits, likely, slope  # before the next slice's are made
        weights = weights.to(exact).unsqueeze(1)
        ctx.save_for_backward(mean.div_(total).sub_(wanted).mul_(weights).to(hidden.dtype))
        return ((highest + total.log() - target_logit) * weights).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (towards,) = ctx.saved_tensors
        return towards * gradients[0].to(towards.dtype), None, None, None, None, None
