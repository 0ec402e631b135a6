"""A client's turn: profile its layers (FOAT), or train a window on its own examples."""

import gc
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from chainfed_ray.adapter import AdapterStack, Tensors, mean_over_tokens
from chainfed_ray.blocks import Blocks
from chainfed_ray.chain import Window
from chainfed_ray.measure import PeakMemory
from chainfed_ray.objective import GlobalTrains, chain_loss, trained_names
from chainfed_ray.prefix import MICRO_BATCH, Activations, PrefixCache
from chainfed_ray.seeds import derive
from chainfed_ray.start_layer import debiased_cka
from chainfed_ray.tokens import Examples


@dataclass(frozen=True)
class Client:
    """One data owner: its examples, and how much of them it may hold in memory at once."""

    name: str
    client_class: str
    examples: Examples
    budget_bytes: int
    planned_bytes: int
    micro_batch: int


@dataclass(frozen=True)
class BaseModel:
    """Which base model a turn streams, and where it may keep its prefix caches."""

    folder: Path
    dtype: torch.dtype
    scratch: Path


@dataclass(frozen=True)
class Profiling:
    """The order to profile the layers on at most ``examples`` examples."""

    examples: int
    seed: int


@dataclass(frozen=True)
class Training:
    """The order to train ``window`` of the stack ``tensors`` for ``epochs`` passes; rates are those of this round."""

    tensors: Tensors
    window: Window
    epochs: int
    batch_size: int
    learning_rate: float
    head_learning_rate: float
    global_weight: float
    global_trains: GlobalTrains
    seed: int


@dataclass(frozen=True)
class Profile:
    """The CKA between each layer's output and the embedding output, and on how many examples."""

    similarities: tuple[float, ...]
    examples: int


@dataclass(frozen=True)
class Update:
    """What a turn of training sends back."""

    tensors: Tensors
    examples: int
    loss: float
    seconds: float
    peak_bytes: int | None


Order = Profiling | Training


def take_turn(client: Client, base: BaseModel, order: Order) -> Profile | Update:
    """Carry out an order. Everything that the turn holds is let go when it returns."""
    # One thread: the order of additions, and so the result, is then the same wherever the turn runs.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    blocks = Blocks(base.folder, base.dtype)
    try:
        if isinstance(order, Profiling):
            return profile(client, blocks, base.scratch / client.name / "profile", order)
        return train(client, blocks, base.scratch / client.name, order)
    finally:
        blocks.close()
        torch.set_num_threads(threads)


def warm_up(base: BaseModel) -> None:
    """Do everything once, on a few tokens: what libraries load and keep the first time is the process's, not a client's."""
    blocks = Blocks(base.folder, base.dtype)
    try:
        mask = torch.ones(2, 4, dtype=torch.int64)
        hidden, calls = blocks.embed(mask, mask)
        stack = AdapterStack.new([0], blocks.hidden_size, 1, 2, seed=0)
        output = stack.adapter(0)(blocks.run(blocks.load_layer(0), stack.adapter(0)(hidden), calls[0]))
        window = Window(0, 0)
        loss = chain_loss(stack, window, output, mask, mask[:, 0], global_weight=0, head_follows_global=False)
        optimizer = torch.optim.AdamW(stack.parameters())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    finally:
        blocks.close()
    # What there is now stays: the collection before each turn need not look at it again, which would take a fifth of a second.
    gc.collect()
    gc.freeze()


@torch.no_grad()
def profile(client: Client, blocks: Blocks, cache_folder: Path, order: Profiling) -> Profile:
    """One forward pass, a layer and a micro-batch in memory at a time; mean-pooled tokens [n, D] are kept of each layer."""
    chosen = _shuffled(len(client.examples), order.seed)[: order.examples]
    examples = client.examples.take(chosen)
    bare = AdapterStack.new((), blocks.hidden_size, bottleneck=1, classes=1, seed=0)
    cache = PrefixCache(cache_folder, blocks, examples)

    def pooled(activations: Activations | None) -> Tensor:
        """Of the layer whose output these are, or of the embeddings, [n, D]."""
        means = []
        for indices in examples.by_length(MICRO_BATCH):
            batch = examples.batch(indices)
            hidden = activations.batch(indices) if activations else blocks.embed(batch.ids, batch.mask)[0]
            means.append(mean_over_tokens(hidden.double(), batch.mask))
        return torch.cat(means)

    try:
        embedded = pooled(None)
        layers = range(blocks.num_layers)
        similarities = tuple(debiased_cka(embedded, pooled(cache.at(layer, bare))) for layer in layers)
    finally:
        cache.clear()
    return Profile(similarities, len(chosen))


def train(client: Client, blocks: Blocks, cache_folder: Path, order: Training) -> Update:
    """Local epochs of AdamW on the window, from the cached output of its bottom layer.

    An optimizer step sees ``batch_size`` examples, in micro-batches whose gradients add up to the whole batch's.
    """
    started = perf_counter()
    with PeakMemory() as peak:
        stack = AdapterStack.from_tensors(order.tensors)
        names = trained_names(stack, order.window, order.global_weight, order.global_trains)
        for name, parameter in stack.named_parameters():
            parameter.requires_grad_(name in names)
        activations = PrefixCache(cache_folder, blocks, client.examples).at(order.window.bottom, stack)
        upper_layers = {layer: blocks.load_layer(layer) for layer in list(order.window)[1:]}
        optimizer = _optimizer(stack, order)
        total_loss, seen = 0.0, 0
        for epoch in range(order.epochs):
            shuffled = _shuffled(len(client.examples), derive(order.seed, "epoch", epoch))
            for first in range(0, len(shuffled), order.batch_size):
                batch = shuffled[first : first + order.batch_size]
                for start in range(0, len(batch), client.micro_batch):
                    indices = batch[start : start + client.micro_batch]
                    loss = _loss(client, blocks, stack, activations, upper_layers, indices, order)
                    (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
                    total_loss += float(loss.detach())
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                seen += len(batch)
        tensors = {name: tensor for name, tensor in stack.tensors().items() if name in names}
    return Update(tensors, len(client.examples), total_loss / seen, perf_counter() - started, peak.bytes)


def window_output(
    blocks: Blocks,
    stack: AdapterStack,
    window: Window,
    layers: dict[int, torch.nn.Module],
    hidden: Tensor,
    mask: Tensor,
) -> Tensor:
    """The window: from its bottom layer's output u [B, T, D] to its top adapter's output h [B, T, D]."""
    hidden = stack.adapter(window.bottom)(hidden)
    if layers:
        calls = blocks.calls(mask)
        for index, layer in layers.items():
            hidden = stack.adapter(index)(blocks.run(layer, hidden, calls[index]))
    return hidden


def _loss(
    client: Client,
    blocks: Blocks,
    stack: AdapterStack,
    activations: Activations,
    layers: dict[int, torch.nn.Module],
    indices: np.ndarray,
    order: Training,
) -> Tensor:
    batch = client.examples.batch(indices)
    hidden = window_output(blocks, stack, order.window, layers, activations.batch(indices), batch.mask)
    return chain_loss(
        stack,
        order.window,
        hidden,
        batch.mask,
        batch.labels,
        global_weight=order.global_weight,
        head_follows_global=order.global_trains != "window",
    )


def _optimizer(stack: AdapterStack, order: Training) -> torch.optim.Optimizer:
    adapters = [parameter for parameter in stack.adapters.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": adapters, "lr": order.learning_rate},
            {"params": list(stack.head.parameters()), "lr": order.head_learning_rate},
        ],
        weight_decay=0.0,
    )


def _shuffled(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)
