"""``python -m benchmarks scale``: what the coordinator of a large fleet takes, by the clients registered and asked.

The model is so small that training costs nothing. Clients are replaced by a model of their time, memory and failure
(``scale_pool.py``), or they are Ray actors that train (``--trained``), or they are at sites on loopback (``--sites``,
``scale_sites.py``). Each cell is measured in its own process.
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
_TRAINED, _SITES = ["100:50"], [1, 8, 64]
_progress = Console(stderr=True, highlight=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    kinds = ("--cells", _CELLS, "clients that are modelled"), ("--trained", _TRAINED, "Ray actors that train")
    for option, default, what in kinds:
        parser.add_argument(
            option, nargs="*", type=_cell, metavar="REGISTERED:ASKED", default=[_cell(cell) for cell in default],
            help=f"{what}: those registered, and those asked in a round; by default {' '.join(default)}",
        )  # fmt: skip
    parser.add_argument("--slots", type=int, default=2, metavar="N", help="how many Ray actors train at a time")
    parser.add_argument(
        "--sites", nargs="*", type=int, default=_SITES, metavar="N", help="so many sites on loopback; by default 1 8 64"
    )
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each job")
    parser.add_argument("--rows", type=int, default=2, help="training rows of a client")
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
    """Measure each cell, write each as soon as it is measured, and print the tables."""
    rows: list[Row] = []
    for slots, cells in ((None, options.cells), (options.slots, options.trained)):
        for registered, asked in cells:
            cell = {"registered": registered, "asked": asked, "rounds": options.rounds, "slots": slots}
            measured = in_a_process("benchmarks.scale_cell", cell | {"rows": options.rows})
            _tell(rows, cell | measured, options.json)
    for sites in options.sites:
        cell = {"sites": sites, "rounds": options.rounds}
        _tell(rows, cell | in_a_process("benchmarks.scale_sites", cell), options.json)
    console = Console(highlight=False, width=190)
    fleets = [row for row in rows if "sites" not in row]
    for words, found, table in (
        ("clients as a model", [row for row in fleets if not row["slots"]], _table),
        (f"clients that train, {options.slots} Ray actors at a time", [row for row in fleets if row["slots"]], _table),
        ("sites on loopback, all played by one process; the API in one process", rows[len(fleets) :], _sites_table),
    ):
        if found:
            console.print(f"\n{words}")
            console.print(table(found))
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread; {date.today()}")


def _tell(rows: list[Row], row: Row, file: Path | None) -> None:
    rows.append(row)
    _progress.print(json.dumps(row), soft_wrap=True)
    if file:
        file.write_text(json.dumps(rows, indent=1))


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in (
        "registered", "asked", "plan, CPU", "start, CPU", "a turn, CPU", "a round, CPU", "to the next order", "idle",
        "peak", "of planning", "started", "stored, a turn", "a round",
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
            *(_size(row[name]) for name in ("turn_stored_bytes", "round_stored_bytes")),
        )  # fmt: skip
    return table


def _size(size: float | None) -> str:
    return "" if size is None else format_bytes(round(size))


def _sites_table(rows: list[Row]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in (
        "sites",
        "a round",
        "a turn",
        "a turn, CPU of the API",
        "of the coordinator",
        "of the sites' actor",
        "in all",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if "failed" in row:  # it was told why when it failed
            table.add_row(str(row["sites"]), "failed")
            continue
        cpu = [row["turn_cpu_seconds"][part] for part in ("API", "coordinator", "actor")]
        seconds = f"{row['round_seconds']:.2f} s", f"{1000 * row['turn_seconds']:.0f} ms"
        table.add_row(str(row["sites"]), *seconds, *(f"{1000 * spent:.0f} ms" for spent in (*cpu, sum(cpu))))
    return table
