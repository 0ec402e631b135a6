"""Rows of ``benchmarks service`` about load: many requests in flight, many submissions at once, memory after many requests."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, sleep

import httpx
import psutil

from benchmarks.cell_process import Row
from benchmarks.service_rows import SERVED, a_job, write_rows

_LIST = "GET /v1/jobs?limit=50"
_IN_FLIGHT, _TURNS, _EACH = 50, 4, 500  # by turns, so many requests of each side
_SUBMITTED, _ROWS = 200, 400
_REQUESTS, _WARM, _STEP, _AT_ONCE = 10_000, 2_000, 1_000, 8
_API = ("ServeReplica:chainfed:Api", "benchmarks.service_alone")
_PATIENCE, _LOOK_SECONDS = 600.0, 0.2
_MIB = 2**20


def in_flight(ours: str, plain: str) -> Iterator[Row]:
    """The list of jobs with so many requests in flight, and a plain route of the same rows, by turns."""
    waits: dict[str, list[float]] = {ours: [], plain: []}
    for _ in range(_TURNS):
        for address, found in waits.items():
            found += _asked(address, _EACH, _IN_FLIGHT, [_LIST])
    for name, part, of in (("p50", median, "half"), ("p99", lambda all_: quantiles(all_, n=100)[98], "99 %")):
        one, other = part(waits[ours]), part(waits[plain])
        said = f"{name} {_ms(one)}, plain {_ms(other)}: {one / other:.2f}×"
        what = f"GET /v1/jobs with {_IN_FLIGHT} requests in flight, {of} within"
        yield {"what": what, "said": said, "seconds": one, "against": other}


def memory(address: str, job: str) -> Iterator[Row]:
    """The memory of the processes of the API after many requests of every kind, and after few."""
    question = json.dumps({"model": SERVED, "texts": ["salt"]})
    paths = (f"/v1/jobs/{job}", f"/v1/jobs/{job}/events", "/v1/models?limit=20", "/metrics")
    asked = [_LIST, *(f"GET {path}" for path in paths), f"POST /v1/classify {question}"]
    after = dict[int, int]()
    for count in range(_STEP, _REQUESTS + 1, _STEP):
        _asked(address, _STEP, _AT_ONCE, asked)
        after[count] = max(process.memory_info().rss for process in _processes())
    few, many = after[_WARM], after[_REQUESTS]
    said = f"{many / _MIB:.1f} MiB resident, {few / _MIB:.1f} after {_WARM:,}: {many / few:.3f}×"
    what = f"the larger process of the API after {_REQUESTS:,} requests"
    yield {"what": what, "said": said, "bytes": many, "against": few, "all": list(after.values())}


def queued(http: httpx.Client, folder: Path) -> Iterator[Row]:
    """So many submissions at the same time, each sent again when it is told to; and the list meanwhile, and then."""
    rows = folder / "many.csv"
    write_rows(rows, _ROWS)
    known = _submitted(http, f"path:{rows}", "first")[0]  # a base model that is known
    alone = [_timed_list(http) for _ in range(_TURNS * 5)]
    beside = list[float]()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    began = monotonic()
    with (
        httpx.Client(base_url=http.base_url, timeout=_PATIENCE, trust_env=False, limits=limits) as many,
        ThreadPoolExecutor(_SUBMITTED) as callers,
    ):
        asked = [callers.submit(_submitted, many, f"path:{rows}", f"many-{place}") for place in range(_SUBMITTED)]
        while not all(one.done() for one in asked):
            beside.append(_timed_list(http))
            sleep(_LOOK_SECONDS)
        found = [one.result() for one in asked]
    seconds = monotonic() - began
    then = [_timed_list(http) for _ in range(_TURNS * 5)]
    for job in (known, *(job for job, _ in found)):
        if http.post(f"/v1/jobs/{job}/cancel").status_code != httpx.codes.CONFLICT:  # it was over
            assert http.get(f"/v1/jobs/{job}").json()["status"] in ("cancelling", "cancelled")
    again = sum(tries - 1 for _, tries in found)
    said = f"all accepted in {seconds:.0f} s, {seconds / _SUBMITTED:.2f} s each; {again} were told to come again"
    yield {"what": f"{_SUBMITTED} submissions of {_ROWS} rows at once", "said": said, "seconds": seconds}
    said = f"p50 {_ms(median(beside))}, the longest {_ms(max(beside))}; then {_ms(median(then))}, before {_ms(median(alone))}"
    yield {"what": "GET /v1/jobs meanwhile", "said": said, "seconds": median(beside), "against": median(alone)}


def _submitted(http: httpx.Client, train: str, name: str) -> tuple[str, int]:
    """The id of a job that is submitted until it is accepted, and how often it was sent."""
    for tries in range(1, 1000):
        answer = http.post("/v1/jobs", json=a_job(name, train))
        if answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
            answer.raise_for_status()
            return answer.json()["id"], tries
        sleep(int(answer.headers["Retry-After"]))
    raise AssertionError("it was never accepted")


def _timed_list(http: httpx.Client) -> float:
    began = monotonic()
    http.get("/v1/jobs?limit=50").raise_for_status()
    return monotonic() - began


def _asked(address: str, count: int, at_once: int, requests: Sequence[str]) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.service_callers", address, str(count), str(at_once), *requests]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout)
    return found


def _processes() -> list[psutil.Process]:
    """The processes that answer requests, below this one."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if any(name in " ".join(process.cmdline()) for name in _API)]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
