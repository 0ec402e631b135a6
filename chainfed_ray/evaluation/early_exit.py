"""The server's judgement of the chain cut at a window's top, one window in memory at a time: an early exit.

With the window at the last layer it is the whole model (streaming_evaluator.py). Large layers are never in memory: their
matrices are streamed by slices, as a small client has it. Which are is settled by their size alone (planner.py), so that
whoever judges a stack again has the same bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chainfed_ray.activity import SILENT, Reporter
from chainfed_ray.budget.planner import PREFIX_BATCH
from chainfed_ray.budget.server import evaluation_weights
from chainfed_ray.chain import Window
from chainfed_ray.data.tokens import Batch, Examples
from chainfed_ray.evaluation.predictions import Predictions, predict
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import through_window
from chainfed_ray.model.pooling import LayerStates, append_pooled
from chainfed_ray.model.prefix import PrefixCache, PrefixRunner
from chainfed_ray.model.source import ModelSource
from chainfed_ray.streaming.matrices import SliceReader


@torch.no_grad()
def predict_early_exit(
    examples: Examples,
    base: ModelSource,
    cache: Path,
    stack: AdapterStack,
    window: Window,
    reporter: Reporter = SILENT,
) -> Predictions:
    """Judge ``stack`` on ``examples`` at the top of ``window``; the prefix below the window is cached in ``cache``."""
    judgement = Predictions.blank(len(examples))
    with _opened(base) as (blocks, matrices):
        for indices, batch, states in _outputs(examples, blocks, matrices, cache, stack, window, reporter):
            judgement.put(torch.from_numpy(indices), predict(blocks, stack, states, batch, matrices))
    return judgement


@torch.no_grad()
def pooled(
    examples: Examples,
    base: ModelSource,
    cache: Path,
    stack: AdapterStack,
    window: Window,
    reporter: Reporter = SILENT,
) -> tuple[Tensor, Tensor]:
    """What the head reads at the top of ``window``, [n, r, D] in float32, and the classes [n], the shortest texts first."""
    means, labels = [], []
    with _opened(base) as (blocks, matrices):
        for _, batch, states in _outputs(examples, blocks, matrices, cache, stack, window, reporter):
            means.append(append_pooled(states.pooled, states.hidden, batch.mask, stack.head_layers))
            labels.append(batch.labels)
    return torch.cat(means), torch.cat(labels)


@contextmanager
def _opened(base: ModelSource) -> Iterator[tuple[Blocks, SliceReader]]:
    """The base model, and a reader of its matrices, which takes no memory before it is used."""
    blocks = Blocks(base.folder, base.dtype)
    matrices = blocks.reader()
    try:
        yield blocks, matrices
    finally:
        matrices.close()
        blocks.close()


def _outputs(
    examples: Examples,
    blocks: Blocks,
    matrices: SliceReader,
    cache: Path,
    stack: AdapterStack,
    window: Window,
    reporter: Reporter,
) -> Iterator[tuple[np.ndarray, Batch, LayerStates]]:
    """Every batch and the places of its examples, with the window's output."""
    below, inside = evaluation_weights(blocks.layer_bytes, blocks.conversion_bytes, len(window))
    runner = PrefixRunner(blocks, matrices=matrices if below == "streamed" else None)
    activations = PrefixCache(cache, runner, examples).at(window.bottom, stack, reporter=reporter)
    streamed = matrices if inside == "streamed" else None
    layers = {layer: blocks.load_layer(layer, streamed) for layer in list(window)[1:]}
    for indices in reporter.each(examples.by_length(PREFIX_BATCH), len(examples), "rows", len):
        batch = examples.batch(indices)
        yield indices, batch, through_window(blocks, stack, window, layers, activations.batch(indices), batch.mask)
