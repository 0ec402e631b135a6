"""A client's part in a head in closed form: sums over its examples, at its window's output."""

from pathlib import Path
from time import process_time

import torch
from torch.nn.functional import layer_norm

from chainfed_ray.adapter import AdapterStack
from chainfed_ray.blocks import Blocks
from chainfed_ray.cap import now
from chainfed_ray.client import Client, Fitting, HeadSums, entering, reader, window_output
from chainfed_ray.discriminant import ClassSums
from chainfed_ray.reading import read_on


@torch.no_grad()
def add_up(client: Client, blocks: Blocks, scratch: Path, order: Fitting) -> HeadSums:
    """One forward pass of the client's examples through its window. The prefix cache that it fills is for training as well."""
    started = process_time()
    plan, examples, window = client.plan, client.examples, client.plan.window
    stack = AdapterStack.from_tensors(order.tensors)
    assert stack.head is not None, "a language model keeps its own head"
    with reader(blocks, plan) as matrices:
        now(f"running the layers below layer {window.bottom}")
        activations = entering(client, blocks, scratch, stack, matrices, order.window)
        now("fitting the head")
        streamed = matrices if plan.grain == "matrix" else None
        layers = {layer: blocks.load_layer(layer, streamed) for layer in list(window)[1:]}
        total = ClassSums.zeros(stack.head.linear.out_features, stack.head.features(window.top))
        for indices in examples.by_length(plan.micro_batch):
            batch = examples.batch(indices)
            states = window_output(blocks, stack, window, layers, activations.batch(indices), batch.mask)
            means = read_on(states.read, states.hidden, batch.mask, stack.reads)
            total.count(layer_norm(means, means.shape[-1:]).flatten(1), batch.labels)
            del states  # before the next batch is run
    return HeadSums(total.tensors(), len(examples), process_time() - started)
