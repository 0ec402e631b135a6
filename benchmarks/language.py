"""``python -m benchmarks language``: the answers of a language model that a fleet has tuned, by each way of training it.

A row of a data set becomes a prompt and its label the answer. An answer is exact if each of its tokens, and the end after it,
is the likeliest. Compute is counted in passes of 16 texts through a layer, forward or backward, so that it has no noise. Each
cell runs in a process of its own, and a run that is started again with the same file goes on where it was.
"""

import argparse
import json
from dataclasses import asdict
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cell_process import Row, in_a_process
from benchmarks.language_cell import METHODS, TASKS, Run

_progress = Console(stderr=True, highlight=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder with a folder for each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--passes", type=int, default=8000, help="the passes of a run, its prefix caches included")
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-3], help="learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--clients", type=int, default=1, help="how many clients share the rows; all take part in a round"
    )
    parser.add_argument("--rows", type=int, default=1600, help="training rows")
    parser.add_argument("--test-rows", type=int, default=1000, help="rows on which answers are counted")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the rows of the table are kept")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Make the runs that the file lacks, and print the table of all that it has."""
    rows: list[Row] = json.loads(options.json.read_text()) if options.json.exists() else []
    for wanted in _runs(options):
        asked = asdict(wanted) | {"data": wanted.task}  # where the rows lie is of no interest
        if any(row["run"] == asked for row in rows):
            continue
        found = in_a_process("benchmarks.language_cell", asdict(wanted))
        rows.append({"run": asked, "date": str(date.today()), **found})
        options.json.write_text(json.dumps(rows, indent=1))
        _progress.print(f"{wanted.task} {wanted.method} {wanted.rate:g} seed {wanted.seed}: {_said(rows[-1])}")
    Console(highlight=False).print(_table(rows))


def _runs(options: argparse.Namespace) -> list[Run]:
    return [
        Run(
            str(options.data),
            task,
            method,
            rate,
            seed,
            options.passes,
            options.clients,
            options.rows,
            options.test_rows,
        )
        for task in options.tasks
        for seed in options.seeds
        for method in options.methods
        for rate in options.rates
    ]


def _said(row: Row) -> str:
    return str(row["failed"]) if "failed" in row else f"{row['exact']:.1%} exact, loss {row['loss']:.3f}"


def _table(rows: list[Row]) -> Table:
    table = Table("task", "method", box=None, header_style="bold", pad_edge=False)
    for name in ("rate", "seed", "exact", "loss", "passes", "prefix", "CPU s", "sent"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        made = row["run"]
        if "failed" in row:
            table.add_row(made["task"], made["method"], f"{made['rate']:g}", str(made["seed"]), row["failed"])
            continue
        table.add_row(
            made["task"],
            made["method"],
            f"{made['rate']:g}",
            str(made["seed"]),
            f"{row['exact']:.1%}",
            f"{row['loss']:.3f}",
            f"{row['passes']:.0f}",
            f"{row['prefix_passes']:.0f}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['sent_bytes'] / 2**20:.1f} MiB",
        )
    return table
