"""A client's turn of head fitting: sums over its examples' pooled features, from which the server fits the head."""

from collections.abc import Iterator
from pathlib import Path
from time import process_time

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from chainfed_ray.aggregation.discriminant import ClassSums
from chainfed_ray.chain import Window
from chainfed_ray.client.entrance import matrix_reader, prefix_runner, window_inputs
from chainfed_ray.client.first_pass import FirstPass
from chainfed_ray.client.messages import Client, Fitting, HeadSums
from chainfed_ray.client.progress import begin
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import through_window
from chainfed_ray.model.pooling import append_pooled
from chainfed_ray.model.prefix import PrefixCache
from chainfed_ray.streaming.matrices import SliceReader

Features = Iterator[tuple[Tensor, Tensor]]  # for each micro-batch: pooled features [B, r, D], labels [B]


@torch.no_grad()
def sum_features(client: Client, blocks: Blocks, scratch: Path, order: Fitting) -> HeadSums:
    """The sums over all examples of the client.

    If no adapter up to the exit is trained yet and the client has the disk for a cache, the features come from the
    first pass (first_pass.py), which runs the missing layers now. Otherwise the examples run through the window.
    """
    started = process_time()
    stack = AdapterStack.from_tensors(order.tensors)
    assert stack.head is not None, "a language model has its own head, which is never fitted"
    with matrix_reader(blocks, client.plan) as matrices:
        if client.plan.prefix.cached and stack.is_new(order.exit):
            features = _first_pass_features(client, blocks, scratch, stack, matrices, order)
        else:
            features = _window_features(client, blocks, scratch, stack, matrices, order)
        # Allocated after the layers below are freed: with both at once, the turn would exceed its plan.
        total = ClassSums.zeros(stack.head.linear.out_features, stack.head.features(order.exit))
        for pooled, labels in features:
            total.count(layer_norm(pooled, pooled.shape[-1:]).flatten(1), labels)
    return HeadSums(total.tensors(), len(client.examples), process_time() - started)


def _first_pass_features(
    client: Client, blocks: Blocks, scratch: Path, stack: AdapterStack, matrices: SliceReader | None, order: Fitting
) -> Features:
    """The features of the base model's layers. Layers whose features are missing run now.

    The activations that enter the window are kept for training. So are those at the chain's lowest layer, which never
    change.
    """
    examples = client.examples
    first_pass = FirstPass(
        PrefixCache(scratch, prefix_runner(blocks, client.plan, matrices), examples), stack.head_layers
    )
    first_pass.keep(*map(stack.below, (min(stack.layers), order.window.bottom)))
    reporter = begin(f"running the layers up to layer {order.exit}")
    for _ in reporter.each(first_pass.up_to(order.exit), order.exit + 1, "layers"):
        pass
    begin("fitting the head")
    pooled = range(max(order.exit - stack.head_layers + 1, 0), order.exit + 1)
    return (
        (first_pass.features.of(pooled, indices), torch.from_numpy(examples.labels[indices]))
        for indices in examples.by_length(client.plan.micro_batch)
    )


def _window_features(
    client: Client, blocks: Blocks, scratch: Path, stack: AdapterStack, matrices: SliceReader | None, order: Fitting
) -> Features:
    """The features at the order's exit. They come through the client's own window, which may be narrower than the order's."""
    plan, examples = client.plan, client.examples
    window = Window(stack.below(plan.window.bottom), order.exit)
    activations = window_inputs(client, blocks, scratch, stack, matrices, order.window)
    begin("fitting the head")
    streamed = matrices if plan.weights == "streamed" else None
    layers = {layer: blocks.load_layer(layer, streamed) for layer in list(window)[1:]}

    def features(indices: np.ndarray) -> tuple[Tensor, Tensor]:
        batch = examples.batch(indices)
        states = through_window(blocks, stack, window, layers, activations.batch(indices), batch.mask)
        return append_pooled(states.pooled, states.hidden, batch.mask, stack.head_layers), batch.labels

    return map(features, examples.by_length(plan.micro_batch))
