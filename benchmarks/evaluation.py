"""``python -m benchmarks evaluation``: the server's memory while it evaluates the whole model.

Each cell of the table is measured in its own process.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cell_process import Row, in_a_process
from benchmarks.shapes import EVALUATED, Shape, written
from chainfed_ray.units import format_bytes

# Where the model is while it is evaluated: whole in memory; in memory layer by layer (a job's engine torch); on disk, in this
# process; on disk, in a run of Ray Train (a job's engine deepspeed).
_ENGINES = ("resident", "torch", "deepspeed", "deepspeed-run")
_progress = Console(stderr=True, highlight=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    names = [shape.name for shape in EVALUATED]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, help="by default all")
    parser.add_argument("--engines", nargs="+", choices=_ENGINES, default=_ENGINES, help="by default all")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="the folder for the temporary weights"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure the rows that were asked for, write each as soon as it is measured, and print the table."""
    rows: list[Row] = []
    for shape in EVALUATED:
        if shape.name not in options.shapes:
            continue
        with written(shape, options.scratch) as folder:
            if isinstance(folder, str):
                _progress.print(f"{shape.name} is skipped: {folder}.")
                continue
            for row in _rows(shape, folder, options):
                rows.append(row)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    Console(highlight=False).print(_table(rows))
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread a process; {date.today()}")


def _rows(shape: Shape, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of a shape. ``ratio`` is the peak with the whole model in memory, divided by the row's own peak."""
    resident: Row = {}
    for engine in options.engines:
        row = _measure(shape, folder, options.scratch, engine)
        if engine == "resident":
            resident = row
        if "peak_bytes" in resident and "peak_bytes" in row:
            row["ratio"] = resident["peak_bytes"] / row["peak_bytes"]
        _progress.print(f"{shape.name}  {engine}  {row.get('failed') or format_bytes(row['peak_bytes'])}")
        yield row


def _measure(shape: Shape, folder: Path, scratch: Path, engine: str) -> Row:
    cell = {"shape": shape.name, "engine": engine, "folder": str(folder), "scratch": str(scratch)}
    found: Row = {"shape": shape.name, "dtype": shape.dtype, "batch": shape.batch, "tokens": shape.tokens}
    found |= {"engine": engine, "planned_bytes": None, "ratio": None}
    return found | in_a_process("benchmarks.evaluation_cell", cell)


def _table(rows: list[Row]) -> Table:
    table = Table("shape", "engine", box=None, header_style="bold", pad_edge=False)
    for name in ("peak", "ratio", "planned", "process", "to load", "s a batch", "beyond"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if "failed" in row:
            table.add_row(row["shape"], row["engine"], row["failed"])
            continue
        table.add_row(
            row["shape"],
            row["engine"],
            format_bytes(row["peak_bytes"]),
            f"{row['ratio']:.1f}×" if row["ratio"] else "",
            format_bytes(row["planned_bytes"]) if row["planned_bytes"] else "",
            format_bytes(row["process_bytes"]) if row["process_bytes"] else "",
            f"{row['load_seconds']:.1f} s",
            f"{row['seconds']:.2f}",
            f"{row['beyond']:.1%}" if row["beyond"] is not None else "",
        )
    return table
