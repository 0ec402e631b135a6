"""Promise: whichever process of a service is killed, and whenever, its jobs end as if nothing had been, and nobody helps.

A job is hurt several times, each time after a number of rounds that the seed gives. It ends with the bits of a job that was
not hurt, or with the turns that it lost on record. Some jobs train at a site, whose process its machine starts again when it
ends, and have their whole model evaluated by DeepSpeed. Meanwhile a caller asks again and again: no answer may be other than
those of the API. How long the caller went without one is printed; docs/RESULTS.md has the figures.
"""

import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from rich.console import Console
from rich.table import Table

from chainfed_ray.api.sdk import calls, exchanges
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.offload.build import are_built, ops_folder
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.records.commit_log import CommitLog
from tests.builders import a_job, assert_same, run
from tests.callers import PROCESSES, Caller
from tests.faults.site_process import SITE, SupervisedSite, at_the_site, dealt_by_the_server
from tests.s3 import Server
from tests.services import Running, listening
from tests.watching import running, wait_for

SEED, KILLS = int(os.environ.get("CHAINFED_FAULTS_SEED", "0")), int(os.environ.get("CHAINFED_FAULTS", "51"))
ROUNDS = 40  # of a job, which is hurt until it is over
pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(120 * KILLS)]

# As in tests.callers, and the worker of an evaluation.
TARGETS = dict(PROCESSES)
EVALUATOR = "a worker of the evaluation"
if are_built(ops_folder()):  # or the coordinator evaluates, in its own process
    TARGETS[EVALUATOR] = "RayTrainWorker"
AT_SITE = ("the process of a site", "what trains at a site")
KINDS = (*TARGETS, *AT_SITE)
OF_CLIENTS = (
    "a client",
    "a fork server",
    "what waits for a fork",
)  # of the cluster's own, which a job at a site has not
LOSES_TURNS = {"a client", "what waits for a fork", *AT_SITE}


class Stored(NamedTuple):
    """A service, what it stores, as another process reads it, and a site that has joined it."""

    name: str
    service: Running
    storage: Storage
    jobs: JobStore
    site: SupervisedSite
    key: str

    def rounds(self, job: str) -> list[dict[str, Any]]:
        """The records of the rounds that a job has committed and told."""
        return [event.data for event in self.jobs.of_kind(job, "round")]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path / "storage") as running:
        yield running


@pytest.fixture(params=["a folder and SQLite", "an object store and PostgreSQL"])
def stored(
    request: pytest.FixtureRequest, document: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> Iterator[Stored]:
    """A service with each kind of storage. A site's key closes it, so everybody has one, and jobs read what they may."""
    roots = (tmp_path, Path(document["model"]["base"].removeprefix("path:")), tiny_data)
    settings = {"CHAINFED_DATA_ROOTS": ":".join(map(str, roots)), "CHAINFED_MODEL_ROOTS": ":".join(map(str, roots))}
    if request.param == "a folder and SQLite":
        storage = Storage.at(tmp_path / "storage")
    else:
        s3: Server = request.getfixturevalue("s3")
        database: str = request.getfixturevalue("empty_postgresql")
        settings |= {"CHAINFED_STORAGE": s3.url("faults"), "CHAINFED_DATABASE": database}
        settings |= {"CHAINFED_CACHE": str(tmp_path / "cache")}
        storage = Storage.at(tmp_path / "watched", database, url=s3.url("faults"))
    with ExitStack() as stack:
        running = stack.enter_context(Running(tmp_path / "storage", settings=settings))
        jobs = stack.enter_context(closing(JobStore(storage.database, existing=True)))
        keys = stack.enter_context(closing(KeyStore(storage.database, existing=True)))
        key, of_site = keys.make_key("ops", ["admin"]).token, keys.make_site_key(SITE, "ops").token
        running.client.close()
        running.client = Client(running.address, key)
        site = stack.enter_context(SupervisedSite(running.address, of_site, tmp_path / "site"))
        yield Stored(request.param, running, storage, jobs, site, key)


def test_whatever_is_killed_nobody_has_to_help(
    stored: Stored, document: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    document["rounds"] |= {"total": ROUNDS, "quorum": 1}
    here, there = document | {"name": "hurt"}, at_the_site(document, tiny_data, tmp_path)
    undisturbed = {
        here["name"]: run(a_job(here, tmp_path), tmp_path / "log")[1],
        there["name"]: run(dealt_by_the_server(there, tmp_path), tmp_path / "log-of-site")[1],
    }
    service = stored.service
    hurt, waits = defaultdict[str, list[str]](list), defaultdict[str, list[float]](list)
    with Caller(service.address, stored.key) as caller:
        for kind, is_at_site in planned(chance)[:KILLS]:
            job = wait_for_rounds(stored, there if is_at_site else here, chance.randint(1, 3))
            hurt[job].append(kind)
            caller.begin()
            kill(stored, kind, chance)
            wait_for(caller.is_steady, "answers", 300)
            waits[kind].append(caller.longest)
        for job in hurt:
            last = list(service.client.stream_json(exchanges.events(job)))[-1]
            assert last["kind"] == "succeeded", last["data"]
    assert not caller.strange
    for job, kinds in hurt.items():
        lost = [turn for record in stored.rounds(job) for turn in record["failed_turns"]]
        if not LOSES_TURNS & set(kinds):
            assert not lost, kinds
        if not lost:
            expected = undisturbed[stored.jobs.get(job).name]
            assert_same(load_stack(stored.storage.model(job)).stack.tensors(), expected)
    show(stored.name, waits, len(hurt))


def planned(chance: random.Random) -> list[tuple[str, bool]]:
    """What is killed, one after the other, and whether that is in a job at the site: every kind as often as any other.

    A third of the kinds that every job has are killed in jobs at the site as well.
    """
    found = list[tuple[str, bool]]()
    while len(found) < KILLS:
        mixed = chance.sample(sorted(KINDS), len(KINDS))
        everywhere = {kind for kind in mixed if kind not in OF_CLIENTS and chance.random() < 1 / 3}
        at_site = {*AT_SITE, EVALUATOR} | everywhere
        found += sorted(((kind, kind in at_site) for kind in mixed), key=lambda one: one[1])
    return found


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
    """The job of this document that runs, as soon as it has finished so many further rounds.

    It is a new one, once that before it is over, if that is of another document, or has too few rounds left.
    """
    client = stored.service.client
    newest = client.json(calls.list_jobs(limit=1))["jobs"]
    goes_on = newest and newest[0]["name"] == document["name"]
    before = len(stored.rounds(newest[0]["id"])) if goes_on else ROUNDS
    if before + rounds + 5 > ROUNDS:
        if newest:
            list(client.stream_json(exchanges.events(newest[0]["id"])))
        newest, before = [client.json(calls.submit_job(document))], 0
    job = str(newest[0]["id"])
    wait_for(lambda: len(stored.rounds(job)) >= before + rounds, "rounds", 300)
    return job


def kill(stored: Stored, kind: str, chance: random.Random) -> None:
    """Kill one process of this kind, or the whole service, as soon as there is one."""
    found = wait_for(lambda: processes(stored, kind), kind, 300)
    chosen = found if kind.startswith("every") else [chance.choice(found)]
    for process in chosen:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def processes(stored: Stored, kind: str) -> Sequence[psutil.Process]:
    """The processes of this kind that there are."""
    if kind in AT_SITE:
        return stored.site.training() if kind.startswith("what") else stored.site.asking()
    return stored.service.processes(TARGETS[kind])


def show(storage: str, waits: dict[str, list[float]], jobs: int) -> None:
    """Print the table of docs/RESULTS.md."""
    table = Table("killed", "times", "longest time without an answer", box=None)
    for kind in KINDS:
        if waits[kind]:
            table.add_row(kind, str(len(waits[kind])), f"{max(waits[kind]):.1f} s")
    Console().print(f"\n{storage}, seed {SEED}, {KILLS} kills, {jobs} jobs", table)
