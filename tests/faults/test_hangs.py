"""Promise: a process of a service that hangs, and does not end, is noticed, and nobody has to help.

Each is stopped by a signal, so that it hears nothing. Meanwhile a caller asks again and again. How long that process was there,
and how long the caller went without an answer, is printed; docs/RESULTS.md has the figures.
"""

import json
import os
import signal
import subprocess
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console
from rich.table import Table

from chainfed_ray.api.sdk import calls, exchanges
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.records.commit_log import CommitLog
from tests.builders import a_job, assert_same, run
from tests.callers import PROCESSES, Caller
from tests.project import COMMAND
from tests.services import Running
from tests.watching import processes_below, running, wait_for

KINDS = tuple(filter(None, os.environ.get("CHAINFED_HANGS", "").split(","))) or (
    "an API replica",
    "Ray's GCS",
    "Ray's raylet",
    "Serve's controller",
    "the controller of jobs",
    "the process of the service",
)
ROUNDS, MANY_ROUNDS = 40, 5000
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


@pytest.mark.parametrize(
    ("kind", "end", "said"),
    [
        ("Ray's raylet", signal.SIGSTOP, "Ray's raylet does not answer Ray's GCS"),
        ("Ray's GCS", signal.SIGSTOP, "Ray has not answered for "),
        ("Ray's raylet", signal.SIGKILL, "Ray's raylet has ended"),
        ("Ray's GCS", signal.SIGKILL, "Ray's gcs_server has ended"),
    ],
)
def test_a_run_whose_ray_hangs_or_ends_does_so_in_words_and_goes_on_when_it_is_run_again(
    kind: str, end: signal.Signals, said: str, document: dict[str, Any], tmp_path: Path
) -> None:
    document["rounds"] |= {"total": MANY_ROUNDS, "quorum": 1}
    job_file, folder = tmp_path / "job.yaml", tmp_path / "out" / document["name"]
    job_file.write_text(yaml.safe_dump(document))
    command = [*COMMAND, "run", str(job_file), "--out", str(tmp_path / "out"), "--json"]
    environment = {**os.environ, "CHAINFED_CLIENT_SLOTS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert any("round 2/" in line for line in process.stderr)
        below = processes_below("", pid=process.pid)
        next(one for one in processes_below(PROCESSES[kind], pid=process.pid)).send_signal(end)
        began = monotonic()
        *_, last = process.stderr.read().splitlines()
        code, answer = process.wait(30), json.loads(process.stdout.read())
    Console().print(f"\n{kind}, {end.name}: the command has ended after {monotonic() - began:.0f} s")
    assert (code, answer["error"]["type"]) == (1, "JobFailed")
    assert last.startswith(f"error: job tiny was ended: {said}")
    assert last.endswith("the same command goes on from there")
    wait_for(lambda: not running(below), "end of all processes", 30)
    done = len(CommitLog(folder).rounds())
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as again:
        assert again.stderr is not None
        assert any(f"round {done + 1}/" in line for line in again.stderr)
        again.terminate()
        again.communicate(timeout=60)
    assert again.returncode == 130
