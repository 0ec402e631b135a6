"""Evaluates an early exit: the chain cut at a window's top, with one window in memory at a time.

An early exit at the last layer is the whole model (streaming_evaluator.py). If the layers are large, their matrices are
streamed in slices, so that no whole layer is in memory. The sizes of the layers alone decide this (budget/server.py), so a
second evaluation of the same stack gives the same bits.
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
    """Evaluate ``stack`` on ``examples`` at the top of ``window``.

    The activations that enter the window are cached in the folder ``cache``.
    """
    predictions = Predictions.blank(len(examples))
    with _opened(base) as (blocks, matrices):
        for indices, batch, states in _outputs(examples, blocks, matrices, cache, stack, window, reporter):
            predictions.put(torch.from_numpy(indices), predict(blocks, stack, states, batch, matrices))
    return predictions


@torch.no_grad()
def pooled_features(
    examples: Examples,
    base: ModelSource,
    cache: Path,
    stack: AdapterStack,
    window: Window,
    reporter: Reporter = SILENT,
) -> tuple[Tensor, Tensor]:
    """The features of a classifier's head at the top of ``window``, and the labels of the examples.

    Features are [n, r, D] in float32, for r pooled layers, the lowest first. Labels are [n]. Both are ordered by the length
    of the text, the shortest first.
    """
    features, labels = [], []
    with _opened(base) as (blocks, matrices):
        for _, batch, states in _outputs(examples, blocks, matrices, cache, stack, window, reporter):
            features.append(append_pooled(states.pooled, states.hidden, batch.mask, stack.head_layers))
            labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels)


@contextmanager
def _opened(base: ModelSource) -> Iterator[tuple[Blocks, SliceReader]]:
    """Open the base model and a reader of its matrices. The reader takes no memory until it is used."""
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
    """For each batch: the indices of its examples, the batch, and the output of ``window`` for it."""
    run = Window(stack.below(window.bottom), window.top)
    below, inside = evaluation_weights(blocks.layer_bytes, blocks.conversion_bytes, len(run))
    runner = PrefixRunner(blocks, matrices=matrices if below == "streamed" else None)
    activations = PrefixCache(cache, runner, examples).at(run.bottom, stack, reporter=reporter)
    streamed = matrices if inside == "streamed" else None
    layers = {layer: blocks.load_layer(layer, streamed) for layer in list(run)[1:]}
    for indices in reporter.each(examples.by_length(PREFIX_BATCH), len(examples), "rows", len):
        batch = examples.batch(indices)
        yield indices, batch, through_window(blocks, stack, run, layers, activations.batch(indices), batch.mask)
