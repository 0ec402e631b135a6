"""``python -m benchmarks scale``: what the coordinator of a large fleet takes, by the clients registered and asked.

The model is so small that training costs nothing. Clients are replaced by a model of their time, memory and failure
(``scale_pool.py``), or they are Ray actors (``--slots``). Each cell is measured in its own process.
"""

import argparse
import json
import os
import platform
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cell_process import Row, in_a_process
from chainfed_ray.units import format_bytes

_CELLS = ["100:10", "1000:10", "10000:10", "1000:100", "10000:100", "1000:500", "10000:500"]
_progress = Console(stderr=True, highlight=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--cells", nargs="+", type=_cell, default=[_cell(cell) for cell in _CELLS], metavar="REGISTERED:ASKED",
        help=f"clients registered, and those asked in a round; by default {' '.join(_CELLS)}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each job")
    parser.add_argument("--rows", type=int, default=2, help="training rows of a client")
    parser.add_argument(
        "--slots", type=int, metavar="N", help="train in so many Ray actors, in place of modelled clients"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def _cell(words: str) -> tuple[int, int]:
    registered, _, asked = words.partition(":")
    if not (registered.isdecimal() and asked.isdecimal() and 0 < int(asked) <= int(registered) * 9 // 10):
        raise argparse.ArgumentTypeError(
            f"{words!r} is no cell such as 1000:100; a tenth of the registered are too small to be asked"
        )
    return int(registered), int(asked)


def run(options: argparse.Namespace) -> None:
    """Measure each cell, write each as soon as it is measured, and print the table."""
    rows: list[Row] = []
    for registered, asked in options.cells:
        cell = {"registered": registered, "asked": asked, "rounds": options.rounds, "slots": options.slots}
        rows.append(cell | in_a_process("benchmarks.scale_cell", cell | {"rows": options.rows}))
        _progress.print(f"{registered} registered, {asked} asked  {rows[-1]}")
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    Console(highlight=False, width=150).print(_table(rows))
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread; {date.today()}")


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in (
        "registered", "asked", "plan, CPU", "start, CPU", "a turn, CPU", "a round, CPU", "to the next order", "idle",
        "peak", "of planning", "started",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if "failed" in row:  # it was told why when it failed
            table.add_row(f"{row['registered']:,}", f"{row['asked']:,}", "failed")
            continue
        bytes_of = (row[name] for name in ("idle_bytes", "peak_bytes", "planned_peak_bytes", "started_bytes"))
        table.add_row(
            f"{row['registered']:,}", f"{row['asked']:,}", f"{row['prepare_cpu_seconds']:.1f} s",
            f"{row['start_cpu_seconds']:.2f} s", f"{1000 * row['turn_cpu_seconds']:.2f} ms",
            f"{row['round_cpu_seconds']:.2f} s", f"{row['seconds_to_next_order']:.2f} s", *map(format_bytes, bytes_of),
        )  # fmt: skip
    return table
