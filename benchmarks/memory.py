"""``python -m benchmarks memory``: the memory of a client's step, beside that of training the whole model.

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
from benchmarks.shapes import SHAPES, Shape, written
from chainfed_ray.units import format_bytes

_WINDOWS = [1, 2, 4, 8]
_BASELINES = ("end-to-end", "checkpointed")
_LOOKING_AHEAD = ("end-to-end-streamed", "exact")  # against the loss of the whole model, with one layer in memory
_COMPARED = 2  # the width of window for which streamed and resident weights are compared
_BUDGETS = {"llama2-7b-4x256": (512 * 2**20, 256 * 2**20)}
_progress = Console(stderr=True, highlight=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    methods = (*_BASELINES, *_LOOKING_AHEAD, "chain", "chain-streamed", "chain-resident", "turn", "exact-turn")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shapes,
        default=[list(SHAPES)],
        metavar="SHAPE",
        help=f"shapes, by their names or the beginning of names: {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--windows", nargs="+", type=int, default=_WINDOWS, metavar="Q", help="adapters trained together"
    )
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="by default all")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="the folder for the temporary weights"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def _shapes(start: str) -> list[str]:
    names = [name for name in SHAPES if name.startswith(start)]
    if not names:
        raise argparse.ArgumentTypeError(f"no shape begins with {start!r}; there are {', '.join(SHAPES)}")
    return names


def run(options: argparse.Namespace) -> None:
    """Measure the rows that were asked for, write each as soon as it is measured, and print the table."""
    shapes = [SHAPES[name] for name in dict.fromkeys(name for names in options.shapes for name in names)]
    rows: list[Row] = []
    for model in dict.fromkeys(shape.model for shape in shapes):
        alike = [shape for shape in shapes if shape.model == model]
        with written(alike[0], options.scratch) as folder:
            if isinstance(folder, str):
                _progress.print(f"{', '.join(shape.name for shape in alike)} is skipped: {folder}.")
                continue
            for shape in alike:
                for row in _rows(shape, folder, options):
                    rows.append(row)
                    if options.json:
                        options.json.write_text(json.dumps(rows, indent=1))
    Console(highlight=False).print(_table(rows))
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread a process; {date.today()}")


def _rows(shape: Shape, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of a shape. ``ratio`` is the peak of training the whole model, divided by the row's own peak."""
    baseline: Row = {}
    for method, window, budget in _cells(shape, options.windows):
        if method in options.methods:
            row = _measure(shape, folder, options.scratch, method, window, budget)
            if method == "end-to-end":
                baseline = row
            if "peak_bytes" in baseline and "peak_bytes" in row:
                row["ratio"] = baseline["peak_bytes"] / row["peak_bytes"]
            _progress.print(f"{shape.name}  {method}  Q={window}  {_said(row)}")
            yield row


def _cells(shape: Shape, windows: list[int]) -> Iterator[tuple[str, int, int | None]]:
    whole = shape.sizes["num_hidden_layers"]
    yield from ((method, whole, None) for method in _BASELINES)
    yield from ((method, width, None) for method, width in zip(_LOOKING_AHEAD, (whole, _COMPARED), strict=True))
    for window in windows:
        yield "chain", window, None
        if window == _COMPARED:
            yield "chain-streamed", window, None
            yield "chain-resident", window, None
    if _COMPARED in windows:
        budgets = _BUDGETS.get(shape.name, ())
        yield from (("turn", _COMPARED, budget) for budget in budgets)
        yield from (("exact-turn", 1, budget) for budget in budgets[:1])


def _measure(shape: Shape, folder: Path, scratch: Path, method: str, window: int, budget: int | None) -> Row:
    cell = {
        "shape": shape.name,
        "method": method,
        "window": window,
        "folder": str(folder),
        "scratch": str(scratch),
        "budget": budget,
    }
    found: Row = {"shape": shape.name, "dtype": shape.dtype, "batch": shape.batch, "tokens": shape.tokens}
    found |= {"method": method, "window": window, "planned_bytes": None, "ratio": None, "breakdown": None}
    return found | in_a_process("benchmarks.memory_cell", cell)


def _said(row: Row) -> str:
    if "peak_bytes" not in row:
        return str(row.get("failed") or row.get("refused"))
    ratio = f", {row['ratio']:.1f}× less" if row["ratio"] else ""
    return f"{format_bytes(row['peak_bytes'])}{ratio}, {row['seconds']:.1f} s"


def _table(rows: list[Row]) -> Table:
    table = Table("shape", "method", box=None, header_style="bold", pad_edge=False)
    for name in ("Q", "peak", "ratio", "planned", "floor", "s a step", "CPU s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if "peak_bytes" not in row:
            table.add_row(row["shape"], row["method"], str(row["window"]), _said(row))
            continue
        under = f" in {format_bytes(row['budget_bytes'])}" if "budget_bytes" in row else ""
        table.add_row(
            row["shape"],
            row["method"] + under,
            str(row["window"]),
            format_bytes(row["peak_bytes"]),
            f"{row['ratio']:.1f}×" if row["ratio"] else "",
            format_bytes(row["planned_bytes"]) if row["planned_bytes"] else "",
            format_bytes(row["floor_bytes"]) if "floor_bytes" in row else "",
            f"{row['seconds']:.2f}",
            f"{row['cpu_seconds']:.2f}",
        )
    return table
