"""A client's turn of head fitting: sums over its examples' pooled features, from which the server fits the head.

``aggregation/discriminant.py`` makes classifiers of the sums. If sites hold the validation rows, each tries the
classifiers on its own rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm

from chainfed_ray.chain import Window
from chainfed_ray.client.entrance import matrix_reader, prefix_runner, window_inputs
from chainfed_ray.client.first_pass import FirstPass
from chainfed_ray.client.messages import Client, Fitting, HeadSums
from chainfed_ray.client.progress import begin
from chainfed_ray.model.adapters import AdapterStack, Tensors
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import through_window
from chainfed_ray.model.pooling import append_pooled
from chainfed_ray.model.prefix import PrefixCache
from chainfed_ray.streaming.matrices import SliceReader

TEMPERATURES = tuple(float(heat) for heat in np.geomspace(0.05, 100.0, 60))  # neighbours differ by an eighth
_SLACK = 1.01  # allows for rounding in float32

Features = Iterator[tuple[Tensor, Tensor]]  # for each micro-batch: pooled features [B, r, D], labels [B]


@dataclass(frozen=True)
class ClassSums:
    """Sums over the features f [F] of examples of C classes, in float32 or float64."""

    counts: Tensor  # [C]: examples of each class
    sums: Tensor  # [C, F]: Σ f for each class
    products: Tensor  # [F, F]: Σ f fᵀ over all examples

    @classmethod
    def zeros(cls, classes: int, features: int, dtype: torch.dtype = torch.float32) -> "ClassSums":
        """The sums over no examples."""
        return cls(
            torch.zeros(classes, dtype=dtype),
            torch.zeros(classes, features, dtype=dtype),
            torch.zeros(features, features, dtype=dtype),
        )

    def count(self, features: Tensor, labels: Tensor) -> None:
        """Add B examples, with features [B, F] and labels [B]."""
        self.counts.index_add_(0, labels, torch.ones(len(labels), dtype=self.counts.dtype))
        self.sums.index_add_(0, labels, features)
        self.products.addmm_(features.T, features)

    def add(self, other: "ClassSums") -> None:
        """Add the sums over other examples."""
        self.counts.add_(other.counts)
        self.sums.add_(other.sums)
        self.products.add_(other.products)

    def impossible(self, examples: int) -> str | None:
        """The reason why these cannot be the sums over ``examples`` examples, or None if they can.

        Features come from LayerNorms, so the squares of an example's F features add up to F at most.
        """
        size = self.sums.shape[1]
        if (self.counts < 0).any() or (self.counts != self.counts.round()).any() or self.counts.sum() != examples:
            return f"it counts {self.counts.sum():g} examples, not {examples}"
        if (self.sums.norm(dim=1) > _SLACK * size**0.5 * self.counts + _SLACK - 1).any():
            return "its features are larger than any that a LayerNorm gives"
        if not 0 <= self.products.trace() <= _SLACK * size * examples:
            return "its products are larger than any of features from a LayerNorm"
        # Of any features, |Σ f_i f_j| is at most the root of Σ f_i² · Σ f_j².
        roots = self.products.diagonal().clamp(min=0).sqrt()
        if (self.products.abs() > _SLACK * torch.outer(roots, roots) + _SLACK - 1).any():
            return "its products are not those of any features"
        return None

    def tensors(self) -> Tensors:
        """The sums by name, as they are sent: of the symmetric products only the lower half, [F (F + 1) / 2]."""
        size = len(self.products)
        half = self.products.new_empty(size * (size + 1) // 2)
        for row, (start, end) in enumerate(_rows_of_half(size)):
            half[start:end] = self.products[row, : row + 1]  # row by row: all views at once would take megabytes
        return {"counts": self.counts, "sums": self.sums, "products": half}

    @classmethod
    def of(cls, tensors: Tensors) -> "ClassSums":
        """The sums whose ``tensors()`` were sent."""
        counts, sums, half = (tensors[name] for name in ("counts", "sums", "products"))
        size = sums.shape[1]
        products = half.new_empty(size, size)
        for row, (start, end) in enumerate(_rows_of_half(size)):
            products[row, : row + 1] = products[: row + 1, row] = half[start:end]
        return cls(counts, sums, products)


def largest(features: int) -> float:
    """A bound of what an example adds to any entry of ``ClassSums`` that are possible, with F = ``features``."""
    return 2.0 * features


def _rows_of_half(size: int) -> Iterator[tuple[int, int]]:
    """The start and the end of each row of a lower triangle, in the flat tensor of its rows end to end."""
    return ((row * (row + 1) // 2, (row + 1) * (row + 2) // 2) for row in range(size))


def grid_losses(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> tuple[tuple[float, ...], int]:
    """The loss of a classifier at each of ``TEMPERATURES``, in nats, and how many examples it gets right.

    Both are sums over ``features`` [n, F] with ``labels`` [n], so those of several sets add up.
    """
    logits = features.double() @ weight.double().T + bias.double()
    losses = tuple(float(cross_entropy(logits / heat, labels, reduction="sum")) for heat in TEMPERATURES)
    return losses, int((logits.argmax(1) == labels).sum())


def sums_bytes(order: Fitting) -> int:
    """The bytes of the sums of a head that is fitted: counts [C], sums [C, F] and products [F, F] in float64."""
    stack = AdapterStack.from_tensors(order.tensors)
    assert stack.head is not None, "a language model's head is never fitted"
    classes, features = stack.head.linear.out_features, stack.head.features(order.exit)
    return 8 * (classes + classes * features + features * features)


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
