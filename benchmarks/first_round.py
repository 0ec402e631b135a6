"""``python -m benchmarks first-round``: the seconds from a job's command to its first round, and how they are spent."""

import argparse
import json
import os
import platform
import tempfile
from datetime import date
from pathlib import Path
from time import time

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.cell_process import Row
from benchmarks.corpora import NAMES, named
from chainfed_ray.activity import Activity
from chainfed_ray.api.command.training import folder_of, train
from chainfed_ray.api.report.progress import ProgressDisplay
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job


class _FirstRound(Exception):
    """The job's first round begins. The benchmark raises it to end the job."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--dataset", choices=NAMES, default="banking77")
    parser.add_argument(
        "--base", default="builtin:minilm", metavar="MODEL", help="the base model, as model.base of a job"
    )
    parser.add_argument("--clients", type=int, default=20, help="the number of clients, each with 64MiB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run a job with the defaults on its own Ray cluster until its first round begins, and print its activities until then."""
    corpus = named(options.dataset)
    spec = parse_job(
        {
            "name": corpus.name.replace("_", "-"),
            "model": {"base": options.base},
            "data": {**corpus.sources, "max_length": corpus.max_length},
            "fleet": {"clients": [{"name": "phone", "count": options.clients, "memory": "64MiB"}]},
        }
    )
    rows = _rows(spec)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    Console(highlight=False).print(_table(rows))
    print(f"{platform.machine()}, {os.cpu_count()} cores; {date.today()}")


def _rows(spec: JobSpec) -> list[Row]:
    """A row for each activity of the job: its name, and how many seconds after the command it began."""
    command = psutil.Process().create_time()
    began: dict[str, float] = {}

    class Watch(ProgressDisplay):
        """Notes when each activity begins, and ends the job with its first round."""

        def listen(self, activity: Activity) -> None:
            began.setdefault(activity.what, time() - command)
            if activity.what.startswith("round 1 "):
                raise _FirstRound

    with tempfile.TemporaryDirectory(prefix="chainfed-") as folder:
        out = Path(folder)
        try:
            with Watch(Console(stderr=True, quiet=True), spec.name, spec) as watch:
                train(spec, folder_of(out, spec), Settings(Storage.at(out)), watch)
        except _FirstRound:
            pass
    return [{"activity": what, "began_seconds": round(seconds, 1)} for what, seconds in began.items()]


def _table(rows: list[Row]) -> Table:
    table = Table("activity", box=None, header_style="bold", pad_edge=False)
    table.add_column("began after", justify="right")
    for row in rows:
        table.add_row(row["activity"], f"{row['began_seconds']:.1f} s")
    return table
