"""``python -m benchmarks padding``: training steps whose examples of like length run together, against padded batches.

Both sides take the same steps on the same examples, by turns in one process. The tokens are counted, with padding; of the CPU
times the least counts, because noise only adds to it.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.cell_process import Row
from benchmarks.row_table import tell
from chainfed_ray.client.messages import Client, Training
from chainfed_ray.client.training import step_batches, train
from chainfed_ray.data.tokens import Examples, of_like_length
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.planning.prepare import PlannedJob, prepare_job
from chainfed_ray.spec.parse import parse_job

_ROWS, _STEPS, _BATCH, _TIMES = 320, 8, 16, 3
_JOBS: dict[str, dict[str, Any]] = {
    "MiniLM, the last two layers": {
        "model": {"base": "builtin:minilm"},
        "data": {"train": "builtin:docstrings", "max_length": 128},
        "chain": {"window": 2, "start": 4},
    },
    "SmolLM2, the last eight layers, LoRA": {
        "model": {"base": "builtin:smollm2", "task": "causal-lm"},
        "data": {"train": "builtin:docstrings", "prompt": "text", "response": "label", "max_length": 128},
        "chain": {"window": 8, "start": 22, "look_ahead": "exact", "adapter": {"kind": "lora"}},
    },
}
_Cut = Callable[[np.ndarray], list[slice]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, and print the table."""
    torch.set_num_threads(1)
    rows = []
    for what, document in _JOBS.items():
        with tempfile.TemporaryDirectory(prefix="chainfed-") as folder:
            rows.append(_row(what, _planned(document, Path(folder)), Path(folder)))
    tell(rows, options.json, width=110)


def _planned(document: dict[str, Any], folder: Path) -> PlannedJob:
    fleet = {"clients": [{"name": "client", "count": 1, "memory": "64GiB"}]}
    rounds = {"total": 1, "clients": 1, "batch_size": _BATCH}
    return prepare_job(parse_job({"name": "padding", "fleet": fleet, "rounds": rounds} | document), folder / "scratch")


def _row(what: str, job: PlannedJob, folder: Path) -> Row:
    client, order = replace(job.clients[0], examples=job.clients[0].examples.take(np.arange(_ROWS))), _order(job)
    blocks, least = Blocks(job.base.folder, job.base.dtype), dict[_Cut, float]()
    cuts: tuple[_Cut, _Cut] = (of_like_length, _whole)
    train(client, blocks, folder, order)  # makes the prefix cache, and loads code and tables
    for cut in cuts * _TIMES:
        with mock.patch("chainfed_ray.client.training.of_like_length", cut):
            started = process_time()
            train(client, blocks, folder, order)
            least[cut] = min(process_time() - started, least.get(cut, np.inf))
    blocks.close()
    tokens, padded = (sum(_tokens(client, order, cut)) for cut in cuts)
    seconds, seconds_padded = (least[cut] for cut in cuts)
    said = f"{tokens} tokens against {padded}; {seconds:.2f} s against {seconds_padded:.2f} s of CPU: "
    return {
        "what": f"{what}: {_STEPS} steps of {_BATCH}",
        "tokens": tokens,
        "padded_tokens": padded,
        "seconds": seconds,
        "padded_seconds": seconds_padded,
        "said": said + f"{seconds / seconds_padded:.2f}×",
    }


def _order(job: PlannedJob) -> Training:
    (client,) = job.clients
    stack = job.new_stack(range(client.plan.window.bottom, job.layers), seed=0)
    return Training(
        stack.tensors(),
        client.plan.window,
        job.layers - 1,
        epochs=1,
        batch_size=_BATCH,
        learning_rate=1e-3,
        head_learning_rate=1e-3,
        global_weight=0.0,
        global_trains="window",
        seed=0,
        steps=_STEPS,
    )


def _tokens(client: Client, order: Training, cut: _Cut) -> Iterator[int]:
    examples: Examples = client.examples
    for batch in step_batches(len(examples), order):
        for indices in examples.by_length(client.plan.micro_batch, batch):
            lengths = examples.lengths[indices]
            yield from (len(lengths[part]) * int(lengths[part].max()) for part in cut(lengths))


def _whole(lengths: np.ndarray) -> list[slice]:
    return [slice(0, len(lengths))]
