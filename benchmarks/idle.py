"""``python -m benchmarks idle``: what a client's process takes before any client uses it, in memory and CPU time.

First of one that loads its libraries itself, step by step; then of clients as they are started: forks of a process that has.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cell_process import Row
from benchmarks.cluster import one_machine
from chainfed_ray.device.peak import ENVIRONMENT, status
from chainfed_ray.units import format_bytes

_PAGES = Path("/proc/self/smaps_rollup")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--base", default="builtin:minilm", metavar="MODEL", help="the base model, as model.base of a job"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure a plain Ray worker as it loads one library after another, then clients' processes, and print the table."""
    with tempfile.TemporaryDirectory() as scratch, one_machine():
        rows = list(_rows(options.base, Path(scratch)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    Console(highlight=False).print(_table(rows))
    print(f"{platform.machine()}, {os.cpu_count()} cores; {date.today()}")


def _rows(name: str, scratch: Path) -> Iterator[Row]:
    import ray
    import torch

    from chainfed_ray.cluster.pool.actors import ClientActor
    from chainfed_ray.cluster.resources import client_options
    from chainfed_ray.hub import resolve
    from chainfed_ray.model.source import ModelSource

    base = ModelSource(resolve(name), torch.float32, scratch)
    loads: dict[str, Callable[[], None]] = {
        "a worker of Ray": _load_nothing,
        "with torch": _load_torch,
        "with the model's code": partial(_load_model, base.folder),
    }
    plain = client_options(0) | {"runtime_env": {"env_vars": ENVIRONMENT}}
    worker: Any = ray.remote(_Worker).options(**plain).remote()
    for process, load in loads.items():
        ray.get(worker.__ray_call__.remote(_call, load))
        yield {"process": process, **ray.get(worker.__ray_call__.remote(_held))}
    ray.kill(worker)
    client_actor: Any = ClientActor
    for process, options in {
        "a client on its own": plain,
        "a client, forked": client_options(0),
        "another one": client_options(0),
    }.items():
        client = client_actor.options(**options).remote(base)
        ray.get(client.prepare.remote())
        yield {"process": process, **ray.get(client.__ray_call__.remote(_held))}
        if options is plain:
            ray.kill(client)


class _Worker:
    """A Ray actor without any code of its own."""


def _call(_worker: _Worker, load: Callable[[], None]) -> None:
    load()


def _held(_actor: object) -> dict[str, float]:
    """The resident bytes of the process: all, and those that no other process of the machine shares; and its CPU time.

    The process that it was forked from has spent its CPU time before.
    """
    sizes = dict(line.split(":") for line in _PAGES.read_text().splitlines()[1:])
    own = sum(int(sizes[name].split()[0]) * 1024 for name in ("Private_Clean", "Private_Dirty"))
    return {
        "resident_bytes": status("VmRSS"),
        "own_bytes": own,
        "shared_bytes": status("VmRSS") - own,
        "modules": len(sys.modules),
        "cpu_seconds": process_time(),
    }


def _load_nothing() -> None:
    """Do nothing. Even so, a worker's first call loads a few packages, such as pyarrow."""


def _load_torch() -> None:
    import torch

    assert torch.get_num_threads()


def _load_model(folder: Path) -> None:
    import torch

    from chainfed_ray.device.lean_imports import load_models
    from chainfed_ray.model.blocks import Blocks

    load_models()
    Blocks(folder, torch.float32).close()


def _table(rows: list[Row]) -> Table:
    table = Table("process", box=None, header_style="bold", pad_edge=False)
    for name in ("resident", "its own", "shared", "modules", "CPU time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        held = (format_bytes(row[name]) for name in ("resident_bytes", "own_bytes", "shared_bytes"))
        table.add_row(row["process"], *held, f"{row['modules']:,}", f"{row['cpu_seconds']:.1f} s")
    return table
