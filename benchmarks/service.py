"""``python -m benchmarks service``: what a service of many jobs costs: its lists, metrics, checks, watchers and its load.

Both sides of each figure are measured in the same run, by turns, since other work on the machine changes all times.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from threading import Event, Thread
from time import monotonic, sleep

import httpx

from benchmarks import service_load
from benchmarks.cell_process import Row
from benchmarks.row_table import tell
from benchmarks.service_rows import SERVED, ManyJobs, a_job, write_rows
from chainfed_ray.activity import Activity
from chainfed_ray.api.command.local_service import free_port, local_service
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.spec.parse import parse_job

_HOST, _PATIENCE = "127.0.0.1", 120.0
_FEW, _SOME, _MANY = 10, 1000, 10_000  # jobs
_TURNS, _EACH = 4, 50  # by turns, so many requests of each side
_ROWS, _SUBMISSIONS = 400, 4
_WATCHERS, _ACTIVITY_SECONDS = 500, 1.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.add_argument(
        "--alone", action="store_true", help="the API's application in one process, without Ray and models"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, and print the table."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chainfed-")))
        storage = Storage.at(folder / "storage")
        jobs = stack.enter_context(closing(ManyJobs(storage)))
        if options.alone:
            http = stack.enter_context(_process("benchmarks.service_alone", storage))
        else:
            settings = Settings(storage, client_slots=1)
            address = stack.enter_context(local_service(settings, _HOST, free_port(_HOST))).address
            http = stack.enter_context(httpx.Client(base_url=address, timeout=_PATIENCE, trust_env=False))
        measures = [_list(jobs, http, storage), _in_flight(jobs, http, storage), _growing(jobs, http)]
        measures += [_watched(jobs, http, storage), service_load.memory(str(http.base_url), jobs.served)]
        if not options.alone:
            measures += [_submissions(http, folder), service_load.queued(http, folder)]
        found = [row for measure in measures for row in _told(measure)]
    tell(found, options.json, width=140)


def _told(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, each printed as it comes."""
    for row in rows:
        print(f"{row['what']}: {row['said']}", flush=True)
        yield row


def _growing(jobs: ManyJobs, http: httpx.Client) -> Iterator[Row]:
    """Metrics and a classification, with few jobs and with many."""
    asked: dict[str, Callable[[], httpx.Response]] = {
        "/metrics": lambda: http.get("/metrics"),
        "a classification": lambda: http.post("/v1/classify", json={"model": SERVED, "texts": ["salt"]}),
    }
    waits: dict[tuple[str, int], list[float]] = {(what, count): [] for what in asked for count in (_FEW, _MANY)}
    for count in (_FEW, _MANY, _FEW, _MANY):
        jobs.set(count)
        for what, ask in asked.items():
            waits[what, count] += _waits(ask, _EACH)
    for what in asked:
        few, many = median(waits[what, _FEW]), median(waits[what, _MANY])
        said = f"p50 {_ms(many)}, {_ms(few)} with {_FEW}: {many / few:.2f}×"
        yield {"what": f"{what} with {_MANY:,} jobs", "said": said, "seconds": many, "against": few}


def _list(jobs: ManyJobs, http: httpx.Client, storage: Storage) -> Iterator[Row]:
    """The list of jobs, and that of a plain route with the same rows and database."""
    jobs.set(_SOME)
    with _process("benchmarks.plain_route", storage) as plain:
        ours, theirs = list[float](), list[float]()
        for _ in range(_TURNS):
            theirs += _waits(lambda: plain.get("/v1/jobs?limit=50"), _EACH)
            ours += _waits(lambda: http.get("/v1/jobs?limit=50"), _EACH)
    one, other = median(ours), median(theirs)
    said = f"p50 {_ms(one)}, plain {_ms(other)}: {one / other:.2f}×"
    yield {"what": f"GET /v1/jobs, 50 of {_SOME:,} jobs", "said": said, "seconds": one, "against": other}


def _in_flight(jobs: ManyJobs, http: httpx.Client, storage: Storage) -> Iterator[Row]:
    """The same with many requests in flight."""
    jobs.set(_SOME)
    with _process("benchmarks.plain_route", storage) as plain:
        yield from service_load.in_flight(str(http.base_url), str(plain.base_url))


@contextmanager
def _process(module: str, storage: Storage) -> Iterator[httpx.Client]:
    """A client of an application that a module serves, in a process of its own."""
    port = free_port(_HOST)
    command = [sys.executable, "-m", module, storage.database, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            with httpx.Client(base_url=f"http://{_HOST}:{port}", timeout=_PATIENCE, trust_env=False) as http:
                yield http
        finally:
            process.terminate()


def _watched(jobs: ManyJobs, http: httpx.Client, storage: Storage) -> Iterator[Row]:
    """The list of jobs while many watch one that works, and while nobody does. What it does changes every second."""
    jobs.set(_SOME)
    alone, beside, told = list[float](), list[float](), 0
    with closing(JobStore(storage.database, existing=True)) as store, _working(store) as job:
        for _ in range(2):
            alone += _waits(lambda: http.get("/v1/jobs?limit=50"), 2 * _EACH, pause=0.02)
            with _Watchers(str(http.base_url), job) as watchers:
                beside += _waits(lambda: http.get("/v1/jobs?limit=50"), 2 * _EACH, pause=0.02)
            told += watchers.told
    assert told > _WATCHERS, "they were told what the job does"
    one, other = median(beside), median(alone)
    said = f"p50 {_ms(one)}, {_ms(other)} without: {one / other:.2f}×"
    yield {"what": f"GET /v1/jobs while {_WATCHERS} watch a job", "said": said, "seconds": one, "against": other}


@contextmanager
def _working(store: JobStore) -> Iterator[str]:
    """A job that tells something new every second. No process runs it: the controller leaves a job alone that is cancelling."""
    job, over = store.submit(parse_job(a_job("watched", "builtin:docstrings"))).id, Event()
    store.move(job, "running")

    def work() -> None:
        done = 0
        while not over.wait(_ACTIVITY_SECONDS):
            done += 1
            store.note_activity(job, Activity(what="training", done=done))

    working = Thread(target=work)
    working.start()
    try:
        yield job
    finally:
        over.set()
        working.join()
        store.move(job, "cancelled")


class _Watchers:
    """Many connections that read the events of one job, in a process of their own."""

    def __init__(self, address: str, job: str) -> None:
        self._command = [sys.executable, "-m", "benchmarks.service_watchers", address, job, str(_WATCHERS)]
        self.told = 0

    def __enter__(self) -> "_Watchers":
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "watching\n"
        return self

    def __exit__(self, *_: object) -> None:
        said, _none = self._process.communicate("stop\n")
        self.told = int(said)


def _submissions(http: httpx.Client, folder: Path) -> Iterator[Row]:
    """From the request to the answer, of a job whose base model is known; and what its check computes, in this process."""
    rows = folder / "rows.csv"
    write_rows(rows, _ROWS)
    waits = []
    for place in range(2 + _SUBMISSIONS):  # two replicas: each knows the model by then
        began = monotonic()
        answer = http.post("/v1/jobs", json=a_job(f"submitted-{place}", f"path:{rows}"))
        waits.append(monotonic() - began)
        answer.raise_for_status()
        http.post(f"/v1/jobs/{answer.json()['id']}/cancel").raise_for_status()
        sleep(2)  # the process for the next check starts, if this one is not kept
    computed = _computed(rows)
    first, later = waits[0], median(waits[2:])
    said = f"{later:.2f} s, the first {first:.2f} s; its check computes {computed:.2f} s"
    what = f"a submission, {_ROWS} rows, until it is accepted"
    yield {"what": what, "said": said, "seconds": later, "first": first, "against": computed}


def _computed(rows: Path) -> float:
    from chainfed_ray.planning.prepare import prepare_job

    spec = parse_job(a_job("computed", f"path:{rows}"))
    prepare_job(spec, Path())
    waits = []
    for _ in range(_SUBMISSIONS):
        began = monotonic()
        prepare_job(spec, Path())
        waits.append(monotonic() - began)
    return median(waits)


def _waits(ask: Callable[[], httpx.Response], count: int, pause: float = 0.0) -> list[float]:
    waits = []
    for place in range(count + 3):
        began = monotonic()
        ask().raise_for_status()
        if place >= 3:  # the first ones warm up
            waits.append(monotonic() - began)
        sleep(pause)
    return waits


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
