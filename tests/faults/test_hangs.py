"""Promise: a process of a service that hangs, and does not end, is noticed, and nobody has to help.

Each is stopped by a signal, so that it hears nothing. Meanwhile a caller asks again and again. How long that process was there,
and how long the caller went without an answer, is printed; docs/RESULTS.md has the figures.
"""

import os
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest
from rich.console import Console
from rich.table import Table

from chainfed_ray.api.sdk import calls, exchanges
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.model.saved_stack import load_stack
from tests.builders import a_job, assert_same, run
from tests.callers import PROCESSES, Caller
from tests.services import Running
from tests.watching import running, wait_for

KINDS = tuple(filter(None, os.environ.get("CHAINFED_HANGS", "").split(","))) or (
    "an API replica",
    "Ray's GCS",
    "Ray's raylet",
    "Serve's controller",
    "the controller of jobs",
    "the process of the service",
)
ROUNDS = 40
pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(400 * len(KINDS))]


def test_whatever_hangs_nobody_has_to_help(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"] |= {"total": ROUNDS, "quorum": 1}
    _, expected = run(a_job(document, tmp_path), tmp_path / "log")
    storage, table = Storage.at(tmp_path / "storage"), Table("hangs", "is gone after", "without an answer", box=None)
    with (
        Running(tmp_path / "storage") as service,
        closing(JobStore(storage.database, existing=True)) as jobs,
        Caller(service.address) as caller,
    ):
        wait_for(caller.is_steady, "answers", 60)
        for kind in KINDS:
            job = service.client.json(calls.submit_job({**document, "name": "hurt"}))["id"]
            wait_for(lambda job=job: jobs.of_kind(job, "round"), "a round", 120)
            hung: list[psutil.Process] = wait_for(lambda kind=kind: service.processes(PROCESSES[kind]), kind)[:1]
            caller.begin()
            began = monotonic()
            hung[0].suspend()
            wait_for(lambda hung=hung: not running(hung), f"end of {kind}", 300)
            gone = monotonic() - began
            last = list(service.client.stream_json(exchanges.events(job)))[-1]
            assert last["kind"] == "succeeded", last["data"]
            assert_same(load_stack(storage.model(job)).stack.tensors(), expected)
            table.add_row(kind, f"{gone:.0f} s", f"{caller.longest:.0f} s")  # it answers by now
    assert not caller.strange
    Console().print("\n", table)
