"""The server's judgement: loss and accuracy of the chain cut at a window's top, one window in memory at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from chainfed_ray.adapter import AdapterStack, mean_over_tokens
from chainfed_ray.blocks import Blocks
from chainfed_ray.chain import Window
from chainfed_ray.client import BaseModel, window_output
from chainfed_ray.prefix import PrefixCache, PrefixRunner
from chainfed_ray.tokens import Batch, Examples

_BATCH = 32


class Score(NamedTuple):
    """Mean cross-entropy in nats, and the share of examples that are classified right."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(examples: Examples, base: BaseModel, cache: Path, stack: AdapterStack, window: Window) -> Score:
    """Judge ``stack`` on ``examples`` at the top of ``window``; the prefix below the window is cached in ``cache``."""
    head = stack.head
    assert head is not None
    loss, right = 0.0, 0
    for batch, hidden in _outputs(examples, base, cache, stack, window):
        logits = head(hidden, batch.mask)
        loss += float(cross_entropy(logits, batch.labels, reduction="sum"))
        right += int((logits.argmax(-1) == batch.labels).sum())
    return Score(loss / len(examples), right / len(examples))


@torch.no_grad()
def pooled(
    examples: Examples, base: BaseModel, cache: Path, stack: AdapterStack, window: Window
) -> tuple[Tensor, Tensor]:
    """The mean over the tokens at the top of ``window``, [n, D] in float32, and the classes [n], the shortest texts first."""
    means, labels = [], []
    for batch, hidden in _outputs(examples, base, cache, stack, window):
        means.append(mean_over_tokens(hidden.float(), batch.mask))
        labels.append(batch.labels)
    return torch.cat(means), torch.cat(labels)


def _outputs(
    examples: Examples, base: BaseModel, cache: Path, stack: AdapterStack, window: Window
) -> Iterator[tuple[Batch, Tensor]]:
    """Every batch, with the window's output [B, T, D]."""
    blocks = Blocks(base.folder, base.dtype)
    try:
        activations = PrefixCache(cache, PrefixRunner(blocks), examples).at(window.bottom, stack)
        layers = {layer: blocks.load_layer(layer) for layer in list(window)[1:]}
        for indices in examples.by_length(_BATCH):
            batch = examples.batch(indices)
            yield batch, window_output(blocks, stack, window, layers, activations.batch(indices), batch.mask)
    finally:
        blocks.close()
