"""Measures one cell of the benchmark of quantized weights: ``python -m benchmarks.quantized_cell CELL-AS-JSON``.

Each cell has its own process. It prints one JSON object: the bytes that the turn reads from the checkpoint, counted by the
checkpoint, its planned and measured memory, and the bytes and CPU seconds of a step.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch

from chainfed_ray.budget.footprint import TurnRequirements
from chainfed_ray.budget.planner import ClientResources, TurnPlan, plan
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client, Training
from chainfed_ray.client.training import train
from chainfed_ray.client.turn import warm_up
from chainfed_ray.data.tokens import Examples
from chainfed_ray.device.peak import PeakMemory
from chainfed_ray.device.threads import one_thread
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import memory_profile_of
from chainfed_ray.model.source import ModelSource

_MIB = 2**20
_BOTTLENECK, _WINDOW, _STEPS = 64, Window(1, 2), 3


@dataclass(frozen=True)
class Cell:
    """The model in ``folder``, computed in ``dtype``, and the batch of a step."""

    folder: str
    dtype: str
    batch: int
    tokens: int
    scratch: str


def measure(cell: Cell) -> dict[str, Any]:
    """Measure a turn of one step that makes the prefix first, and then turns of one and of several steps."""
    torch.set_num_threads(1)
    base = ModelSource(Path(cell.folder), getattr(torch, cell.dtype), Path(cell.scratch))
    warm_up(base)
    blocks = Blocks(base.folder, base.dtype)
    made, layers, hidden = _streamed_plan(blocks, cell), blocks.num_layers, blocks.hidden_size
    blocks.close()
    client = Client("client", "client", _examples(cell), made.planned_bytes, made, made.planned_bytes)

    def turn(epochs: int) -> tuple[int, float, int | None]:
        """The bytes read, the CPU seconds and the peak of memory in a turn of one step for each of ``epochs``."""
        tensors = AdapterStack.new(range(layers), hidden, _BOTTLENECK, None, seed=0).state_dict()
        started = process_time()
        with PeakMemory() as peak, one_thread():
            blocks = Blocks(base.folder, base.dtype)
            train(client, blocks, base.scratch, _order(tensors, cell.batch, epochs))
            blocks.close()
        return blocks.bytes_read, process_time() - started, peak.bytes

    whole, one, many = turn(1), turn(1), turn(_STEPS)
    return {
        "turn_bytes": whole[0],
        "step_bytes": (many[0] - one[0]) // (_STEPS - 1),
        "step_cpu_seconds": (many[1] - one[1]) / (_STEPS - 1),
        "planned_bytes": made.planned_bytes,
        "peak_bytes": max(peak for _, _, peak in (whole, one, many) if peak is not None),
    }


def _streamed_plan(blocks: Blocks, cell: Cell) -> TurnPlan:
    """The plan of the client with the most memory that streams all its weights."""
    memory = memory_profile_of(blocks, _BOTTLENECK, None)
    requirements = TurnRequirements(
        start=0, batch_size=cell.batch, epochs=1, global_branch=True, trains_above=False, profiles=0
    )
    resources = ClientResources(
        2 * memory.layer + 1024 * _MIB, cell.tokens, cached=True, offload_disk=None, batch=cell.batch, one_step=False
    )
    for budget in range(resources.memory, 0, -_MIB):
        made = plan(memory, requirements, _WINDOW, replace(resources, memory=budget))
        if made and made.weights == made.prefix.weights == "streamed":
            return made
    raise SystemExit("no plan streams the weights")


def _order(tensors: dict[str, torch.Tensor], batch: int, epochs: int) -> Training:
    return Training(
        tensors,
        _WINDOW,
        _WINDOW.top,
        epochs=epochs,
        batch_size=batch,
        learning_rate=1e-3,
        head_learning_rate=1e-3,
        global_weight=0.1,
        global_trains="head",
        seed=0,
    )


def _examples(cell: Cell) -> Examples:
    """One batch of random tokens, none of them padding."""
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 1000, cell.batch * cell.tokens).astype(np.int32)
    offsets = np.arange(cell.batch + 1, dtype=np.int64) * cell.tokens
    examples = Examples(ids, offsets, np.zeros(cell.batch, dtype=np.int64))
    return replace(examples, targets=examples.every_token)


if __name__ == "__main__":
    described = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory(dir=described.pop("scratch")) as scratch:
        print(json.dumps(measure(Cell(**described, scratch=scratch))))
