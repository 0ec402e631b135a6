"""``python -m benchmarks fleet-memory``: the memory of a job's whole tree of processes, round by round, with a large fleet.

The job is run by ``chainfed run``: simulated clients of a real model, real texts, Ray actors that train. Its processes are
looked at from outside.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.autoscaling_cluster import in_a_tree_of_its_own
from benchmarks.cell_process import Row
from benchmarks.corpora import NAMES, named
from benchmarks.process_tree import held_bytes
from chainfed_ray.units import format_bytes

_COMMAND = [sys.executable, "-c", "from chainfed_ray.api.command.entry import main; main()", "run"]
_LOOK_SECONDS = 1.0
_FIRST = 3  # the round with which the last one is compared: until then, processes start and load what they keep
_progress = Console(stderr=True, highlight=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--dataset", choices=NAMES, default="banking77")
    parser.add_argument(
        "--base", default="builtin:minilm", metavar="MODEL", help="the base model, as model.base of a job"
    )
    parser.add_argument("--clients", type=int, default=1000, help="simulated clients, each with 64MiB")
    parser.add_argument("--asked", type=int, default=50, help="clients that are asked in a round")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the job, print a line after each round, and then how the last round compares with the third."""
    in_a_tree_of_its_own()
    rows: list[Row] = []
    with TemporaryDirectory(prefix="chainfed-fleet-") as folder:
        for row in _rows(Path(folder), _document(options)):
            rows.append(row)
            most, after = (format_bytes(row[name]) for name in ("most_bytes", "after_bytes"))
            _progress.print(
                f"round {row['round']}: {row['seconds']:.0f} s, {row['turns']} turns; at most {most}, after it {after}, "
                f"{row['processes']} processes"
            )
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    Console(highlight=False).print(_table(rows))
    if len(rows) > _FIRST:
        early, late = rows[_FIRST - 1], rows[-1]
        most, after = (late[name] / early[name] for name in ("most_bytes", "after_bytes"))
        print(f"round {late['round']} against round {early['round']}: at most {most:.3f}×, after it {after:.3f}×")
    print(f"{platform.machine()}, {os.cpu_count()} cores, two turns at a time on each; {date.today()}")


def _document(options: argparse.Namespace) -> dict[str, Any]:
    corpus = named(options.dataset)
    return {
        "name": "fleet",
        "model": {"base": options.base},
        "data": {**corpus.sources, "max_length": 32},
        "fleet": {
            "partition": {"scheme": "iid"},
            "clients": [{"name": "phone", "count": options.clients, "memory": "64MiB"}],
        },
        "chain": {"start": 2, "head": "zero"},  # or each client of the fleet takes turns besides those of the rounds
        "rounds": {"total": options.rounds, "clients": options.asked, "convergence": {"rule": "none"}},
    }


def _rows(folder: Path, document: dict[str, Any]) -> Iterator[Row]:
    """Run the job, and give a row for each round as soon as it is committed."""
    (folder / "job.json").write_text(json.dumps(document))
    command = [*_COMMAND, str(folder / "job.json"), "--out", str(folder / "out"), "--json"]
    with (folder / "errors").open("w+") as errors:
        job = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            yield from _watched(job, folder / "out" / document["name"] / "rounds")
            if job.wait():
                errors.seek(0)
                sys.exit(f"the job failed: {errors.read()[-1000:]}")
        finally:
            job.terminate()
            job.wait()


def _watched(job: "subprocess.Popen[bytes]", commits: Path) -> Iterator[Row]:
    """Look at the processes below this one while ``job`` runs. Each round ends with its record in ``commits``."""
    round, most, began = 1, 0, monotonic()
    while job.poll() is None:
        processes, held = held_bytes(psutil.Process())
        most = max(most, held)
        record = commits / f"{round - 1:06}.json"
        if record.exists():
            turns = len(json.loads(record.read_text())["record"]["turns"])
            yield {
                "round": round,
                "seconds": monotonic() - began,
                "turns": turns,
                "most_bytes": most,
                "after_bytes": held,
                "processes": processes,
            }
            round, most, began = round + 1, 0, monotonic()
        else:
            sleep(_LOOK_SECONDS)


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("round", "seconds", "turns", "at most", "after it", "processes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        sizes = (format_bytes(row[name]) for name in ("most_bytes", "after_bytes"))
        table.add_row(str(row["round"]), f"{row['seconds']:.0f}", str(row["turns"]), *sizes, str(row["processes"]))
    return table
