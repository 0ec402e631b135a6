"""``python -m benchmarks serving``: the time to answer with many stacks at once, against one stack, and one after another.

Both sides of each ratio are timed in turns in the same process, and the least CPU time of each counts: noise only adds to it.
Texts are written once, because they take long. The answers of both sides are compared.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from time import process_time

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cell_process import Row
from benchmarks.random_stacks import RandomStacks
from benchmarks.serving_texts import text_rows
from chainfed_ray.data.docstrings import rows
from chainfed_ray.serving.classifier import Classifier

_ROUNDS = 7
_CLASSES, _BOTTLENECK, _TOLERANCE = 8, 64, 1e-5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--stacks", type=int, default=32, help="how many stacks, and texts of a batch")
    parser.add_argument(
        "--texts", type=int, default=16, help="how many texts are written together, over half as many stacks"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, and print the table."""
    torch.set_num_threads(1)
    found = [*_rows(options.stacks), *text_rows(options.texts, options.texts // 2)]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    table = Table("work", "together", "compared with", "its CPU time", "throughput")
    for row in found:
        times = (f"{row[name]:.2f} s" for name in ("together_seconds", "other_seconds"))
        table.add_row(row["what"], next(times), row["other"], next(times), f"{row['ratio']:.2f}×")
    Console(highlight=False).print(table)
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread; least CPU time of {_ROUNDS}; {date.today()}")


def _rows(count: int) -> list[Row]:
    base = "builtin:minilm"
    classifier = Classifier(base, torch.float32)
    made = RandomStacks(base, _BOTTLENECK)
    stacks = [made.stack(seed, _CLASSES, head_layers=4) for seed in range(count)]
    texts = [text for text, _ in rows()[:count]]
    asked = [(saved, [text]) for saved, text in zip(stacks, texts, strict=True)]

    def together() -> torch.Tensor:
        return torch.cat(classifier.of_each(asked))

    def one_stack() -> torch.Tensor:
        return classifier.probabilities(stacks[0], texts)

    def one_after_another() -> torch.Tensor:
        return torch.cat([classifier.probabilities(saved, own) for saved, own in asked])

    difference = (together() - one_after_another()).abs().max().item()
    assert difference < _TOLERANCE, f"the answers differ by {difference}"
    return [
        _compared(count, together, "one stack for all texts", one_stack),
        _compared(count, together, "each text alone, one after another", one_after_another),
    ]


def _compared(count: int, together: Callable[[], object], other: str, run_other: Callable[[], object]) -> Row:
    pairs = [(_cpu_seconds(together), _cpu_seconds(run_other)) for _ in range(_ROUNDS)]
    ours, theirs = (min(times) for times in zip(*pairs, strict=True))
    return {
        "what": f"{count} texts classified, {count} stacks",
        "together_seconds": ours,
        "other": other,
        "other_seconds": theirs,
        "ratio": theirs / ours,
    }


def _cpu_seconds(work: Callable[[], object]) -> float:
    started = process_time()
    work()
    return process_time() - started
