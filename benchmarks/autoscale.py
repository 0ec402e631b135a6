"""``python -m benchmarks autoscale``: how fast a cluster follows what the chain asks for.

The nodes are processes of this machine that Ray's autoscaler starts and ends, so the time that a cloud takes to give a machine
is not in the figures.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.cell_process import Row, in_a_process

_FIGURES = {
    "small_seconds": "a client waits → the node of its class, small",
    "medium_seconds": "medium",
    "large_seconds": "large",
    "together_seconds": "three clients wait at once → the nodes of all",
    "told_seconds": "a client that no node can hold → told",
    "gone_seconds": "the last client has ended → the head is alone",
}
_OF_SERVICE = {
    "first_seconds": "a job is submitted → the first node for clients",
    "job_seconds": "… → the job is done",
    "gone_seconds": "the job is done → no node for clients is left",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--times", type=int, default=3, help="how often the cluster grows and shrinks")
    parser.add_argument("--idle", type=float, default=10.0, help="seconds after which an idle node is removed")
    parser.add_argument("--service", action="store_true", help="by jobs of the service, which runs on the cluster")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, and print the table."""
    module = "benchmarks.autoscale_service" if options.service else "benchmarks.autoscale_cell"
    measured = in_a_process(module, {"times": options.times, "idle_seconds": options.idle})
    if "failed" in measured:
        sys.exit(str(measured["failed"]))
    rows: list[Row] = measured["rows"]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    Console(highlight=False, width=150).print(_table(rows, _OF_SERVICE if options.service else _FIGURES))
    if options.service:
        print(
            "left, once the job is over:",
            ", ".join(f"{count} {name}" for name, count in sorted(rows[-1]["left"].items())),
        )
    print(f"a node is removed after {options.idle:g} s; {platform.machine()}, {os.cpu_count()} cores; {date.today()}")


def _table(rows: list[Row], figures: Mapping[str, str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("", "median", "most"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for key, words in figures.items():
        values = [row[key] for row in rows]
        table.add_row(words, f"{median(values):.1f} s", f"{max(values):.1f} s")
    return table
