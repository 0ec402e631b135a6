"""Makes one run of the language benchmark: ``python -m benchmarks.language_cell RUN-AS-JSON``.

Every method is a job of the product: a chain with windows, look-ahead and direction of its own. End to end is a window of all
layers. The runs of a task have the same rows, clients, batches and number of passes.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chainfed_ray.chain import Chain
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.client.turn import warm_up
from chainfed_ray.evaluation.streaming_evaluator import StreamingEvaluator
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.federation.evaluation import sets_of
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.trunk import LayerCall
from chainfed_ray.planning.prepare import prepare_job
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.spec.parse import parse_job

_LAYERS, _BATCH, _STEPS = 30, 16, 5  # of the model; texts of a step; steps of a turn
TASKS = {"banking77": "Question: {}\nIntent: ", "ag_news": "News: {}\nTopic: "}  # the prompt of a row


def _last(width: int) -> dict[str, Any]:
    return {"window": width, "start": _LAYERS - width}


def _several(width: int, start: int, slide: int, **chain: str) -> dict[str, Any]:
    return {"window": width, "start": start, "slide": slide, **chain}


METHODS: dict[str, tuple[dict[str, Any], float]] = {  # a chain, and the share of its rounds that its last stage has
    "end-to-end": (_last(_LAYERS), 1.0),
    **{f"last-{width}": (_last(width), 1.0) for width in (2, 4, 8, 15)},
    "down-8-from-14": (_several(8, 14, 8, direction="down"), 0.4),
    "down-8-by-4-from-14": (_several(8, 14, 4, direction="down"), 0.25),
    "up-8-from-14": (_several(8, 14, 8), 0.6),
    "up-4-from-22-local": (_several(4, 22, 2, look_ahead="none"), 0.5),
}


@dataclass(frozen=True)
class Run:
    """What is run. ``passes`` are those of 16 texts through a layer."""

    data: str
    task: str
    method: str
    rate: float
    seed: int
    passes: int
    clients: int
    rows: int
    test_rows: int


def measure(run: Run, folder: Path) -> dict[str, Any]:
    """Make a run, and give the fields of its row."""
    torch.set_num_threads(1)
    job = prepare_job(parse_job(_document(run, folder)), folder / "scratch")
    warm_up(job.base)
    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(folder / "log"))
    coordinator.open()
    started = process_time()
    with counted() as passes:
        sent = sum(turn.sent_bytes for record in coordinator.rounds() for turn in record.turns)
    cpu = process_time() - started
    found = StreamingEvaluator(job.base, job.planner.costs, sets_of(job)).evaluate(coordinator.stack(), "test")
    predicted = found.predictions
    return {
        "exact": float((predicted.correct == predicted.counts).double().mean()),
        "loss": float(predicted.losses.sum() / predicted.counts.sum()),
        "passes": sum(passes) / _BATCH,
        "prefix_passes": passes[0] / _BATCH,
        "cpu_seconds": cpu,
        "sent_bytes": sent,
        "rounds": job.spec.rounds.total,
    }


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the texts that pass through a layer within the block: without gradients, and in training, backward included."""
    passes, run = [0, 0], Blocks.run

    def counting(blocks: Blocks, layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
        output = run(blocks, layer, hidden, call)
        passes[output.requires_grad] += len(hidden) * (2 if output.requires_grad else 1)
        return output

    Blocks.run = counting  # type: ignore[method-assign, assignment]
    try:
        yield passes
    finally:
        Blocks.run = run  # type: ignore[method-assign]


def _document(run: Run, folder: Path) -> dict[str, Any]:
    chain, last_share = METHODS[run.method]
    look_ahead = chain.get("look_ahead", "exact")
    for split, count in (("train", run.rows), ("test", run.test_rows)):
        _write_rows(run, split, count, folder / f"{split}.jsonl")
    return {
        "name": "language",
        "model": {"base": "builtin:smollm2", "task": "causal-lm"},
        "data": {
            "train": f"path:{folder / 'train.jsonl'}",
            "test": f"path:{folder / 'test.jsonl'}",
            "prompt": "prompt",
            "response": "response",
            "max_length": 128,
        },
        "fleet": {"clients": [{"name": "client", "count": run.clients, "memory": "64GiB"}]},
        "chain": chain | {"look_ahead": look_ahead, "adapter": {"kind": "lora"}},
        "rounds": {
            "total": rounds_of(run, chain | {"look_ahead": look_ahead}, last_share),
            "clients": run.clients,
            "local_steps": _STEPS,
            "batch_size": _BATCH,
            "learning_rate": run.rate,
            "last_stage_share": last_share,
            "restore_best": False,
            "convergence": {"rule": "none"},
        },
        "evaluation": {"every": "never", "whole_every": "never"},
        "seed": run.seed,
    }


def rounds_of(run: Run, chain: dict[str, Any], last_share: float) -> int:
    """As many rounds as there are passes for. A window's prefix is run once for each row; going down, from the start again."""
    windows = Chain(
        _LAYERS,
        chain["start"],
        chain["window"],
        chain.get("slide", 1),
        chain.get("direction", "up"),
        chain["look_ahead"],
    )
    batches = run.rows * 0.9 / _BATCH  # a tenth is for validation
    for rounds in range(10_000, 0, -1):
        stages = windows.staged(rounds, last_share)
        training = sum(
            stage.rounds * _STEPS * run.clients * 2 * (windows.exit(stage.window) - stage.window.bottom + 1)
            for stage in stages
        )
        if training + batches * _prefix(windows, [stage.window.bottom for stage in stages]) <= run.passes:
            return rounds
    raise ValueError(f"{run.passes} passes are too few for a round of {run.method}")


def _prefix(chain: Chain, bottoms: list[int]) -> int:
    """The layers that each row runs through for the prefix caches of windows with these ``bottoms``, in their order."""
    if chain.direction == "up":
        return bottoms[-1]
    return chain.start + sum(bottom - chain.start for bottom in bottoms)  # each from the cache at the chain's start


def _write_rows(run: Run, split: str, count: int, path: Path) -> None:
    lines = (Path(run.data) / run.task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = np.random.default_rng(run.seed if split == "train" else 99).permutation(len(lines))[:count]
    with path.open("w", encoding="utf-8") as file:
        for row in (json.loads(lines[place]) for place in chosen):
            made = {"prompt": TASKS[run.task].format(row["text"]), "response": str(row["label"]).replace("_", " ")}
            file.write(json.dumps(made) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="chainfed-language-") as scratch:
        print(json.dumps(measure(Run(**json.loads(sys.argv[1])), Path(scratch))))
