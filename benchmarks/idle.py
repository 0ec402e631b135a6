"""``python -m benchmarks idle``: the memory of a client's process before any client uses it, and what takes how much of it."""

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
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cell_process import Row
from benchmarks.cluster import one_machine
from chainfed_ray.device.peak import status
from chainfed_ray.units import format_bytes


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--base", default="builtin:minilm", metavar="MODEL", help="the base model, as model.base of a job"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure a plain Ray worker as it loads one library after another, then a client's process, and print the table."""
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
    worker: Any = ray.remote(_Worker).options(**client_options(0)).remote()
    for process, load in loads.items():
        ray.get(worker.__ray_call__.remote(_call, load))
        yield {"process": process, **ray.get(worker.__ray_call__.remote(_held))}
    ray.kill(worker)
    client_actor: Any = ClientActor
    client = client_actor.options(**client_options(0)).remote(base)
    ray.get(client.prepare.remote())
    yield {"process": "a client, idle", **ray.get(client.__ray_call__.remote(_held))}


class _Worker:
    """A Ray actor without any code of its own."""


def _call(_worker: _Worker, load: Callable[[], None]) -> None:
    load()


def _held(_actor: object) -> dict[str, int]:
    """The resident bytes of the process: all, its own, and the pages of files, which the processes of a machine share."""
    return {
        "resident_bytes": status("VmRSS"),
        "own_bytes": status("RssAnon"),
        "file_bytes": status("RssFile"),
        "modules": len(sys.modules),
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
    for name in ("resident", "its own", "pages of files", "modules"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        held = (format_bytes(row[name]) for name in ("resident_bytes", "own_bytes", "file_bytes"))
        table.add_row(row["process"], *held, f"{row['modules']:,}")
    return table
