"""A client's part in a head in closed form: sums over its examples, at its window's output."""

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
from chainfed_ray.device.cap import enter_phase
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import through_window
from chainfed_ray.model.pooling import append_pooled
from chainfed_ray.model.prefix import PrefixCache
from chainfed_ray.streaming.matrices import SliceReader

Features = Iterator[tuple[Tensor, Tensor]]  # of each micro-batch: what the head reads [B, r, D], and the classes [B]


@torch.no_grad()
def sum_features(client: Client, blocks: Blocks, scratch: Path, order: Fitting) -> HeadSums:
    """The sums of all the client's examples.

    Up to a window that was never trained they are made of what the first pass left (first_pass.py), if the client has the disk
    for that; what is missing of it is made now. Else the examples run through the window.
    """
    started = process_time()
    stack = AdapterStack.from_tensors(order.tensors)
    assert stack.head is not None, "a language model keeps its own head"
    with matrix_reader(blocks, client.plan) as matrices:
        if client.plan.prefix.cached and stack.is_new(order.window.top):
            features = _of_first_pass(client, blocks, scratch, stack, matrices, order.window)
        else:
            features = _of_window(client, blocks, scratch, stack, matrices, order.window)
        # Made when the layers below are gone: with both at once a turn would need more than its plan.
        total = ClassSums.zeros(stack.head.linear.out_features, stack.head.features(order.window.top))
        for means, classes in features:
            total.count(layer_norm(means, means.shape[-1:]).flatten(1), classes)
    return HeadSums(total.tensors(), len(client.examples), process_time() - started)


def _of_first_pass(
    client: Client, blocks: Blocks, scratch: Path, stack: AdapterStack, matrices: SliceReader | None, stage: Window
) -> Features:
    """Those of the base model's layers: what of them is not there yet is made.

    The activations at the bottom of ``stage`` stay, and those at the chain's lowest layer, below which nothing ever changes.
    """
    examples = client.examples
    first_pass = FirstPass(
        PrefixCache(scratch, prefix_runner(blocks, client.plan, matrices), examples), stack.head_layers
    )
    enter_phase(f"running the layers up to layer {stage.top}")
    first_pass.keep(min(stack.layers), stage.bottom)
    for _ in first_pass.up_to(stage.top):
        pass
    enter_phase("fitting the head")
    pooled = range(max(stage.top - stack.head_layers + 1, 0), stage.top + 1)
    return (
        (first_pass.features.of(pooled, indices), torch.from_numpy(examples.labels[indices]))
        for indices in examples.by_length(client.plan.micro_batch)
    )


def _of_window(
    client: Client, blocks: Blocks, scratch: Path, stack: AdapterStack, matrices: SliceReader | None, stage: Window
) -> Features:
    """Those of the output of the client's own window, which may be narrower than ``stage``."""
    plan, examples, window = client.plan, client.examples, client.plan.window
    enter_phase(f"running the layers below layer {window.bottom}")
    activations = window_inputs(client, blocks, scratch, stack, matrices, stage)
    enter_phase("fitting the head")
    streamed = matrices if plan.weights == "streamed" else None
    layers = {layer: blocks.load_layer(layer, streamed) for layer in list(window)[1:]}

    def means(indices: np.ndarray) -> tuple[Tensor, Tensor]:
        batch = examples.batch(indices)
        states = through_window(blocks, stack, window, layers, activations.batch(indices), batch.mask)
        return append_pooled(states.pooled, states.hidden, batch.mask, stack.head_layers), batch.labels

    return map(means, examples.by_length(plan.micro_batch))
