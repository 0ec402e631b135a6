"""Promise: whichever process of a service is killed, and whenever, its jobs end as if nothing had been, and nobody helps.

A job is hurt several times, each time after a number of rounds that the seed gives. It ends with the bits of a job that was
not hurt, or with the turns that it lost on record. Meanwhile a caller asks again and again: no answer may be other than those
of the API. How long the caller went without one is printed; docs/RESULTS.md has the figures.
"""

import os
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from rich.console import Console
from rich.table import Table

from chainfed_ray.api.sdk import calls, exchanges
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.records.commit_log import CommitLog
from tests.builders import a_job, assert_same, run
from tests.callers import TARGETS, Caller
from tests.s3 import Server
from tests.services import Running, listening
from tests.watching import running, wait_for

SEED, KILLS = int(os.environ.get("CHAINFED_FAULTS_SEED", "0")), int(os.environ.get("CHAINFED_FAULTS", "28"))
ROUNDS = 40  # of a job, which is hurt until it is over
pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(120 * KILLS)]


class Stored(NamedTuple):
    """A service, and what it stores, as another process reads it."""

    name: str
    service: Running
    storage: Storage
    jobs: JobStore

    def rounds(self, job: str) -> list[dict[str, Any]]:
        """The records of the rounds that a job has committed and told."""
        return [event.data for event in self.jobs.of_kind(job, "round")]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path / "storage") as running:
        yield running


@pytest.fixture(params=["a folder and SQLite", "an object store and PostgreSQL"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stored]:
    """A service with each kind of storage."""
    if request.param == "a folder and SQLite":
        settings, storage = dict[str, str](), Storage.at(tmp_path / "storage")
    else:
        s3: Server = request.getfixturevalue("s3")
        database: str = request.getfixturevalue("empty_postgresql")
        settings = {"CHAINFED_STORAGE": s3.url("faults"), "CHAINFED_DATABASE": database}
        settings |= {"CHAINFED_CACHE": str(tmp_path / "cache")}
        storage = Storage.at(tmp_path / "watched", database, url=s3.url("faults"))
    with (
        Running(tmp_path / "storage", settings=settings) as running,
        closing(JobStore(storage.database, existing=True)) as jobs,
    ):
        yield Stored(request.param, running, storage, jobs)


def test_whatever_is_killed_nobody_has_to_help(stored: Stored, document: dict[str, Any], tmp_path: Path) -> None:
    chance = random.Random(SEED)
    plan = [kind for _ in range(-(-KILLS // len(TARGETS))) for kind in chance.sample(sorted(TARGETS), len(TARGETS))]
    document["rounds"] |= {"total": ROUNDS, "quorum": 1}
    _, expected = run(a_job(document, tmp_path), tmp_path / "log")
    service = stored.service
    hurt, waits = defaultdict[str, list[str]](list), defaultdict[str, list[float]](list)
    with Caller(service.address) as caller:
        for kind in plan[:KILLS]:
            job = wait_for_rounds(stored, document, chance.randint(1, 3))
            hurt[job].append(kind)
            caller.begin()
            kill(service, kind, chance)
            wait_for(caller.is_steady, "answers", 300)
            waits[kind].append(caller.longest)
        for job in hurt:
            last = list(service.client.stream_json(exchanges.events(job)))[-1]
            assert last["kind"] == "succeeded", last["data"]
    assert not caller.strange
    for job, kinds in hurt.items():
        lost = [turn for record in stored.rounds(job) for turn in record["failed_turns"]]
        if not {"a client", "what waits for a fork"} & set(kinds):
            assert not lost, kinds
        if not lost:
            assert_same(load_stack(stored.storage.model(job)).stack.tensors(), expected)
    show(stored.name, waits, len(hurt))


def test_serve_itself_killed_and_started_again(service: Running, document: dict[str, Any], tmp_path: Path) -> None:
    """It is a second service on this machine: where two listen on one port, either is given the other's requests."""
    document["rounds"] |= {"total": 8}
    with Running(tmp_path / "other") as first:
        ports = [listening(running) for running in (service, first)]
        assert all(ports), "each listens somewhere"
        assert not ports[0] & ports[1]
        job = first.client.json(calls.submit_job(document))["id"]
        events = first.client.stream_json(exchanges.events(job))
        assert next(event for event in events if event["kind"] == "round")
        orphans = psutil.Process(first.process.pid).children(recursive=True)
        first.process.kill()
        first.close()
        wait_for(lambda: not running(orphans), "end of what it had started")
    assert len(CommitLog(tmp_path / "other" / "jobs" / job).rounds()) < 8
    with Running(tmp_path / "other", first.port) as second:  # where the first one was
        kinds = [event["kind"] for event in second.client.stream_json(exchanges.events(job))]
        assert kinds == ["queued", "validating", "running", "started", *["round"] * 8, "finished", "succeeded"]


def wait_for_rounds(stored: Stored, document: dict[str, Any], rounds: int) -> str:
    """The job that runs, as soon as it has finished so many further rounds; a new one if there is none with as many left."""
    client = stored.service.client
    newest = client.json(calls.list_jobs(limit=1))["jobs"]
    before = len(stored.rounds(newest[0]["id"])) if newest else ROUNDS
    if before + rounds + 5 > ROUNDS:
        if newest:
            list(client.stream_json(exchanges.events(newest[0]["id"])))
        newest, before = [client.json(calls.submit_job({**document, "name": "hurt"}))], 0
    job = str(newest[0]["id"])
    wait_for(lambda: len(stored.rounds(job)) >= before + rounds, "rounds", 300)
    return job


def kill(service: Running, kind: str, chance: random.Random) -> None:
    """Kill one process of this kind, or the whole service, as soon as there is one."""
    found = wait_for(lambda: service.processes(TARGETS[kind]), kind)
    chosen = found if kind.startswith("every") else [chance.choice(found)]
    for process in chosen:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def show(storage: str, waits: dict[str, list[float]], jobs: int) -> None:
    """Print the table of docs/RESULTS.md."""
    table = Table("killed", "times", "longest time without an answer", box=None)
    for kind in TARGETS:
        if waits[kind]:
            table.add_row(kind, str(len(waits[kind])), f"{max(waits[kind]):.1f} s")
    Console().print(f"\n{storage}, seed {SEED}, {KILLS} kills, {jobs} jobs", table)
