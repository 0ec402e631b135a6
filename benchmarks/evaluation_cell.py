"""Measures one cell of the evaluation benchmark: ``python -m benchmarks.evaluation_cell CELL-AS-JSON``.

Each cell has its own process. It prints one JSON object: the peak above the idle process, the peak of the whole process, the
seconds of a batch, and how much longer an evaluation takes than its forward passes.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.cluster import one_machine
from benchmarks.shapes import EVALUATED, Shape
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.client.turn import warm_up
from chainfed_ray.cluster.offload.build import ops_folder
from chainfed_ray.cluster.offload.footprint import offload_footprint
from chainfed_ray.cluster.offload.model import OffloadedModel
from chainfed_ray.data.tokens import Examples
from chainfed_ray.device.peak import PeakMemory, status
from chainfed_ray.evaluation.evaluator import Evaluated, Evaluator
from chainfed_ray.evaluation.predictions import Predictions, predict
from chainfed_ray.evaluation.streaming_evaluator import StreamingEvaluator
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import memory_profile_of
from chainfed_ray.model.forward import through_model
from chainfed_ray.model.source import ModelSource

_BOTTLENECK, _CLASSES = 64, 4
_BATCHES, _EVALUATIONS = 2, 3  # the first evaluation loads the model, so its seconds are not counted
_SET = "held-out"


@dataclass(frozen=True)
class Cell:
    """The cell that is measured; ``folder`` has the model, and ``scratch`` is for temporary files."""

    shape: str
    engine: str
    folder: str
    scratch: str


def measure(cell: Cell) -> dict[str, Any]:
    """Evaluate random stacks with the cell's engine, and give the measured fields of its row."""
    torch.set_num_threads(1)
    shape = next(shape for shape in EVALUATED if shape.name == cell.shape)
    base = ModelSource(Path(cell.folder), getattr(torch, shape.dtype), Path(cell.scratch))
    classes = None if shape.language_model else _CLASSES
    blocks = Blocks(base.folder, base.dtype)
    stacks = [
        AdapterStack.new(range(blocks.num_layers), blocks.hidden_size, _BOTTLENECK, classes, seed)
        for seed in range(_EVALUATIONS)
    ]
    examples = _examples(shape)
    engines: dict[str, Callable[[], Evaluator]] = {
        "resident": lambda: _Resident(base, examples, shape.batch),
        "torch": lambda: StreamingEvaluator(base, _memory(base, classes), {_SET: examples}),
        "deepspeed": lambda: _Offloaded(base, _memory(base, classes), examples, shape),
        "deepspeed-run": lambda: _run(base, _memory(base, classes), examples, shape.batch),
    }
    make = engines[cell.engine]
    if cell.engine != "deepspeed":
        warm_up(base)  # the offloaded model warms up the process by itself
    with one_machine() if cell.engine == "deepspeed-run" else nullcontext():
        evaluator = make()
        try:
            started = perf_counter()
            first = evaluator.evaluate(stacks[0], _SET)
            first_seconds = perf_counter() - started
            later = [evaluator.evaluate(stack, _SET) for stack in stacks[1:]]
        finally:
            evaluator.close()
    seconds = sum(found.forward_seconds for found in later) / len(later)
    whole = sum(found.seconds for found in later) / len(later)
    peaks = [found.peak_bytes for found in (first, *later) if found.peak_bytes is not None]
    return {
        "peak_bytes": max(peaks),
        "planned_bytes": first.planned_bytes,
        "process_bytes": None if cell.engine == "deepspeed-run" else _PROCESS.most,
        "load_seconds": first_seconds - seconds,
        "seconds": seconds / _BATCHES,
        "beyond": None if cell.engine in ("torch", "resident") else whole / seconds - 1,
    }


class _Process:
    """The peak of this process, with its libraries. It is read after each measurement, since the next one resets it."""

    most = 0

    def look(self) -> None:
        self.most = max(self.most, status("VmHWM"))


_PROCESS = _Process()


class _Resident:
    """An evaluator that holds every layer in memory. Embeddings and a language model's head are streamed, as elsewhere."""

    engine = "resident"

    def __init__(self, base: ModelSource, examples: Examples, batch: int) -> None:
        self._examples, self._batch = examples, batch
        with PeakMemory() as self._loading:
            self._blocks = Blocks(base.folder, base.dtype)
            self._layers = [self._blocks.load_layer(index) for index in range(self._blocks.num_layers)]
        _PROCESS.look()

    @torch.no_grad()
    def evaluate(self, stack: AdapterStack, examples: str) -> Evaluated:
        blocks, matrices = self._blocks, self._blocks.reader()
        predictions = Predictions.blank(len(self._examples))
        started = perf_counter()
        with PeakMemory() as peak:
            for indices in self._examples.by_length(self._batch):
                batch = self._examples.batch(indices)
                states = through_model(blocks, stack, enumerate(self._layers), batch)
                predictions.put(torch.from_numpy(indices), predict(blocks, stack, states, batch, matrices))
        seconds = perf_counter() - started
        _PROCESS.look()
        matrices.close()
        held = 0 if None in (peak.start, self._loading.start) else (peak.start or 0) - (self._loading.start or 0)
        return Evaluated(predictions, seconds, seconds, None, held + (peak.bytes or 0))

    def close(self) -> None:
        self._blocks.close()


class _Offloaded:
    """An evaluator that has its model on disk, in this process and without Ray."""

    engine = "deepspeed"

    def __init__(self, base: ModelSource, memory: MemoryProfile, examples: Examples, shape: Shape) -> None:
        blocks = Blocks(base.folder, base.dtype)
        self._planned = offload_footprint(blocks, memory, 1, shape.batch, shape.tokens).total
        self._examples, self._batch = examples, shape.batch
        self._make: Callable[[], OffloadedModel] = lambda: OffloadedModel(
            base, base.scratch / "nvme", ops_folder(), _PROCESS.look
        )
        self._model: OffloadedModel | None = None

    def evaluate(self, stack: AdapterStack, examples: str) -> Evaluated:
        started = perf_counter()
        if self._model is None:
            self._model = self._make()
        share = self._model.evaluate(stack, self._examples, self._batch)
        _PROCESS.look()
        return Evaluated(
            share.predictions, perf_counter() - started, share.forward_seconds, self._planned, share.peak_bytes
        )

    def close(self) -> None:
        if self._model:
            self._model.close()


def _run(base: ModelSource, memory: MemoryProfile, examples: Examples, batch: int) -> Evaluator:
    from chainfed_ray.cluster.offload.evaluator import make_evaluator

    made = make_evaluator(base, memory, {_SET: examples}, batch_size=batch)
    if isinstance(made, str):
        raise SystemExit(made)
    return made


def _memory(base: ModelSource, classes: int | None) -> MemoryProfile:
    blocks = Blocks(base.folder, base.dtype)
    try:
        return memory_profile_of(blocks, _BOTTLENECK, classes)
    finally:
        blocks.close()


def _examples(shape: Shape) -> Examples:
    """Two batches of random tokens, none of them padding."""
    generator = np.random.default_rng(0)
    count = _BATCHES * shape.batch
    ids = generator.integers(3, 1000, count * shape.tokens).astype(np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * shape.tokens
    examples = Examples(ids, offsets, generator.integers(0, _CLASSES, count))
    return replace(examples, targets=examples.every_token) if shape.language_model else examples


if __name__ == "__main__":
    described = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory(dir=described.pop("scratch")) as scratch:
        print(json.dumps(measure(Cell(**described, scratch=scratch))))
