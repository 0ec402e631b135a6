"""Measures one cell of the memory benchmark: ``python -m benchmarks.memory_cell CELL-AS-JSON``.

Each cell has its own process. It prints one JSON object: the peak above the idle process, the planned bytes, and the seconds of
a step.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM

from benchmarks.shapes import SHAPES, Shape
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.footprint import Footprint, SavedActivations, TurnRequirements, WeightPlacement, footprint
from chainfed_ray.budget.planner import ClientResources, TurnPlan, plan
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client, Training, Update
from chainfed_ray.client.turn import take_turn, warm_up
from chainfed_ray.data.tokens import Examples
from chainfed_ray.device.peak import PeakMemory
from chainfed_ray.model.adapters import Adapter, AdapterStack, Head
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import memory_profile_of
from chainfed_ray.model.source import ModelSource
from chainfed_ray.model.trunk import find_layers

_BOTTLENECK, _CLASSES, _LAMBDA = 64, 4, 0.1
_STEPS = 3  # steps of the timed turn; a turn of one step is subtracted from it
_ABOVE = 3  # layers above the window of a turn with an exact look-ahead
# For each method of the chain: where the weights are, what becomes of saved activations, and whether it looks ahead exactly.
_PLACEMENTS: dict[str, tuple[WeightPlacement, SavedActivations, bool]] = {
    "chain": ("streamed", "offloaded", False),
    "chain-streamed": ("streamed", "kept", False),
    "chain-resident": ("resident", "kept", False),
    "exact": ("streamed", "recomputed", True),
    "end-to-end-streamed": ("streamed", "recomputed", True),
}


@dataclass(frozen=True)
class Cell:
    """The cell that is measured. ``budget`` is the cap in bytes of a whole turn, for the method ``turn``."""

    shape: str
    method: str
    window: int
    folder: str
    scratch: str
    budget: int | None = None


def measure(cell: Cell) -> dict[str, Any]:
    """Measure a cell, and give the measured fields of its row."""
    torch.set_num_threads(1)
    shape = SHAPES[cell.shape]
    base = ModelSource(Path(cell.folder), getattr(torch, shape.dtype), Path(cell.scratch))
    warm_up(base)
    if cell.method in ("end-to-end", "checkpointed"):
        return _end_to_end(shape, base.folder, checkpointed=cell.method == "checkpointed")
    if cell.method in ("turn", "exact-turn"):
        assert cell.budget is not None
        return _turn(shape, base, cell.window, cell.budget, exact=cell.method == "exact-turn")
    return _chain(shape, base, cell.window, *_PLACEMENTS[cell.method])


def _end_to_end(shape: Shape, folder: Path, checkpointed: bool) -> dict[str, Any]:
    """A step of end-to-end training: the whole model, with an adapter after each layer."""
    examples = _examples(shape)
    batch = examples.batch(np.arange(shape.batch))
    with PeakMemory() as peak:
        kind = AutoModelForCausalLM if shape.language_model else AutoModel
        model = kind.from_pretrained(folder, dtype=getattr(torch, shape.dtype)).eval().requires_grad_(False)
        layers = model.get_submodule(find_layers(model, shape.name))
        width = model.config.hidden_size
        adapters = [Adapter(width, _BOTTLENECK, seed) for seed in range(len(layers))]
        for layer, adapter in zip(layers, adapters, strict=True):
            layer.forward = _with_adapter(layer.forward, adapter, checkpointed)
        head = Head(width, _CLASSES)
        trained = [parameter for adapter in adapters for parameter in adapter.parameters()]
        trained += [] if shape.language_model else list(head.parameters())
        optimizer = torch.optim.AdamW(trained, foreach=False)
        started, cpu = perf_counter(), process_time()
        if shape.language_model:
            loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.ids).loss
        else:
            hidden = model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
            loss = cross_entropy(head(hidden, batch.mask), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds, cpu_seconds = perf_counter() - started, process_time() - cpu
    return {"peak_bytes": peak.bytes, "seconds": seconds, "cpu_seconds": cpu_seconds}


def _with_adapter(forward: Callable[..., Any], adapter: Adapter, checkpointed: bool) -> Callable[..., Any]:
    """A layer's forward, followed by its adapter. With ``checkpointed`` nothing is saved: the backward pass runs both again."""

    def both(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)

    if not checkpointed:
        return both
    return lambda *args, **kwargs: checkpoint(both, *args, use_reentrant=False, **kwargs)


def _chain(
    shape: Shape, base: ModelSource, width: int, weights: WeightPlacement, activations: SavedActivations, exact: bool
) -> dict[str, Any]:
    """A step of the chain's lowest window, which has the most above it. The prefix is already in the cache."""
    memory, requirements, resources = _planning(shape, base, 2**40, exact)
    window = Window(0, width - 1)
    parts = footprint(memory, requirements, window, shape.batch, shape.tokens, weights, activations)
    unbounded = plan(memory, requirements, window, resources)
    assert unbounded
    # An unmeasured turn makes the prefix first, so the plan needs no memory for it. The method ``turn`` measures the prefix.
    made = TurnPlan(window, shape.batch, weights, activations, replace(unbounded.prefix, planned_bytes=0), parts, 0)
    client = Client("client", "client", _examples(shape), 2**40, made, 2**40)
    _step(client, base, shape, exact, epochs=1)
    one = _step(client, base, shape, exact, epochs=1)
    many = _step(client, base, shape, exact, epochs=_STEPS)
    return {
        "peak_bytes": many[0].peak_bytes,
        "planned_bytes": made.planned_bytes,
        "seconds": (many[0].seconds - one[0].seconds) / (_STEPS - 1),
        "cpu_seconds": (many[1] - one[1]) / (_STEPS - 1),
        "breakdown": parts.parts(),
        "floor_bytes": _floor(parts, memory, shape),
    }


def _turn(shape: Shape, base: ModelSource, width: int, budget: int, exact: bool) -> dict[str, Any]:
    """A whole turn under the cap ``budget``: the prefix, training, and the update.

    The window is the second one or, with an ``exact`` look-ahead, one with a few layers above it.
    """
    memory, requirements, resources = _planning(shape, base, budget, exact)
    bottom = memory.layers - _ABOVE - width if exact else 1
    window = Window(bottom, bottom + width - 1)
    made = plan(memory, requirements, window, resources)
    if made is None:
        return {"refused": "no plan fits the budget"}
    client = Client("client", "client", _examples(shape), budget, made, min(made.planned_bytes, budget))
    started = perf_counter()
    update, cpu = _step(client, base, shape, exact, epochs=1, capped=True)
    return {
        "peak_bytes": update.peak_bytes,
        "planned_bytes": made.planned_bytes,
        "budget_bytes": budget,
        "seconds": perf_counter() - started,
        "cpu_seconds": cpu,
        "sent_bytes": sum(tensor.nbytes for tensor in update.tensors.values()),
        "breakdown": made.footprint.parts(),
        "plan": {
            "window": [made.window.bottom, made.window.top],
            "micro_batch": made.micro_batch,
            "weights": made.weights,
            "activations": made.activations,
            "prefix": asdict(made.prefix),
        },
    }


def _planning(
    shape: Shape, base: ModelSource, budget: int, exact: bool
) -> tuple[MemoryProfile, TurnRequirements, ClientResources]:
    """What the planner needs to know of the model, the job and a client with ``budget`` bytes of memory."""
    blocks = Blocks(base.folder, base.dtype)
    try:
        memory = memory_profile_of(blocks, _BOTTLENECK, None if shape.language_model else _CLASSES)
    finally:
        blocks.close()
    requirements = TurnRequirements(
        start=0, batch_size=shape.batch, epochs=1, global_branch=not exact, trains_above=False, profiles=0,
        exact=exact,
    )  # fmt: skip
    resources = ClientResources(budget, shape.tokens, cached=True, offload_disk=None, batch=shape.batch, one_step=False)
    return memory, requirements, resources


def _step(
    client: Client, base: ModelSource, shape: Shape, exact: bool, epochs: int, capped: bool = False
) -> tuple[Update, float]:
    """A turn of one step for each of ``epochs``: its update, and the CPU seconds that it took."""
    blocks = Blocks(base.folder, base.dtype)
    layers, hidden = blocks.num_layers, blocks.hidden_size
    blocks.close()

    def order() -> Training:
        classes = None if shape.language_model else _CLASSES
        return Training(
            AdapterStack.new(range(layers), hidden, _BOTTLENECK, classes, seed=0).state_dict(),
            client.plan.window,
            layers - 1 if exact else client.plan.window.top,
            epochs=epochs,
            batch_size=shape.batch,
            learning_rate=1e-3,
            head_learning_rate=1e-3,
            global_weight=0 if exact else _LAMBDA,
            global_trains="head",
            seed=0,
        )

    started = process_time()
    update = take_turn(client, base, order, capped)
    assert isinstance(update, Update)
    return update, process_time() - started


def _floor(parts: Footprint, memory: MemoryProfile, shape: Shape) -> int:
    """The bytes that a step needs even without saved activations.

    These are the weights in memory, the trained tensors with gradients and optimizer state, and a batch's input and output.
    """
    rows = shape.batch * shape.tokens * memory.hidden * memory.itemsize
    held = parts.layer_weights + parts.buffers + parts.adapters + parts.head + parts.gradients + parts.optimizer
    return held + 2 * rows


def _examples(shape: Shape) -> Examples:
    """One batch of random tokens, none of them padding."""
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 1000, shape.batch * shape.tokens).astype(np.int32)
    offsets = np.arange(shape.batch + 1, dtype=np.int64) * shape.tokens
    examples = Examples(ids, offsets, generator.integers(0, _CLASSES, shape.batch))
    return replace(examples, targets=examples.every_token)


if __name__ == "__main__":
    described = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory(dir=described.pop("scratch")) as scratch:
        print(json.dumps(measure(Cell(**described, scratch=scratch))))
