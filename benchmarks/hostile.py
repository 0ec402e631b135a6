"""``python -m benchmarks hostile``: sends hostile requests to a service, and measures how long another caller waits."""

import argparse
import json
import os
import platform
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from functools import partial
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.cell_process import Row
from benchmarks.hostile_requests import HostileRequest, hostile_requests

_PATIENCE = 400.0  # seconds; a check may take two minutes
_PAUSE = 0.02
_HALVES = 4200  # more than HAProxy has connections
_WATCHERS = 200


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--address", default="http://127.0.0.1:8000", help="a running service, such as `chainfed serve`"
    )
    parser.add_argument("--only", metavar="WORDS", default="", help="only the requests whose description has the words")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Send each request while a bystander asks for the list of jobs, again and again, and print the table."""
    rows: list[Row] = []
    with httpx.Client(base_url=options.address, timeout=_PATIENCE, trust_env=False) as http:
        for request in hostile_requests():
            if options.only in request.what:
                rows.append(_row(f"{request.method} {request.what}", options.address, partial(_status, http, request)))
        for what, many in {"half a head": _half_heads, "half a body": _half_bodies, "watching": _watchers}.items():
            if options.only in what:
                rows.append(_row(f"many times {what}", options.address, partial(many, options.address)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    Console(highlight=False, width=120).print(_table(rows))
    failed = [row for row in rows if row["status"] >= 500 or row["bystander_failed"]]
    longest = max(row["longest_wait_seconds"] for row in rows)
    print(f"{len(rows)} requests, {len(failed)} of them with 5xx; the longest wait of a bystander: {longest:.2f} s")
    print(f"{platform.machine()}, {os.cpu_count()} cores; {date.today()}")


def _row(what: str, address: str, send: Callable[[], int]) -> Row:
    began = monotonic()
    with _bystander(address) as waits:
        status = send()
    return {
        "request": what,
        "status": status,
        "seconds": round(monotonic() - began, 3),
        "longest_wait_seconds": round(max(waits, default=0.0), 3),
        "bystander_failed": sum(wait == float("inf") for wait in waits),
    }


def _status(http: httpx.Client, request: HostileRequest) -> int:
    return http.request(request.method, request.path, headers=dict(request.headers), content=request.body).status_code


@contextmanager
def _bystander(address: str) -> Iterator[list[float]]:
    """The seconds that another caller waited for each of its answers meanwhile; infinite if it had none.

    It opens a connection for each. If the service is on this machine, it calls from another address than the hostile one.
    """
    waits: list[float] = []
    over, alone = Event(), urlsplit(address).hostname == "127.0.0.1"
    elsewhere = httpx.HTTPTransport(local_address="127.0.0.2" if alone else None)

    def ask() -> None:
        with httpx.Client(base_url=address, timeout=_PATIENCE, transport=elsewhere) as http:
            while not over.is_set():
                began = monotonic()
                try:
                    works = http.get("/v1/jobs", params={"limit": 1}, headers={"Connection": "close"}).is_success
                except httpx.TransportError:
                    works = False
                waits.append(monotonic() - began if works else float("inf"))
                over.wait(_PAUSE)

    asking = Thread(target=ask)
    asking.start()
    try:
        yield waits
    finally:
        over.set()
        asking.join()


def _half_heads(address: str) -> int:
    return _halves(address, b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\n")


def _half_bodies(address: str) -> int:
    head = (
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    )
    return _halves(address, head + b'{"name": "half')


def _halves(address: str, start: bytes) -> int:
    """Send the ``start`` of a request over many connections, and hold them for a while. The status of the first answer.

    The service may refuse some of them.
    """
    there, most = urlsplit(address), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as open_ones:
        connections = []
        for _ in range(_HALVES):
            with suppress(ConnectionError):
                connection = socket.create_connection((there.hostname, there.port))
                connections.append(open_ones.enter_context(connection))
                connection.sendall(start)
        connections[0].settimeout(60)
        try:
            answer = connections[0].recv(1000)
        except TimeoutError:
            return 0
    return int(answer.split()[1]) if answer else 0


def _watchers(address: str) -> int:
    """Watch a job that waits, many times at once. The status of the last answer."""
    with httpx.Client(base_url=address, timeout=_PATIENCE, trust_env=False, limits=httpx.Limits()) as http:
        jobs = http.get("/v1/jobs", params={"limit": 1}).json()["jobs"]
        if not jobs:
            return 0
        asked = (f"/v1/jobs/{jobs[0]['id']}/events", {"Accept": "text/event-stream"})
        with ExitStack() as open_ones:
            for _ in range(_WATCHERS):
                answer = open_ones.enter_context(http.stream("GET", asked[0], headers=asked[1]))
            sleep(5)
            return answer.status_code


def _table(rows: list[Row]) -> Table:
    table = Table("request", box=None, header_style="bold", pad_edge=False)
    for name in ("status", "seconds", "longest wait of a bystander"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        waited = "no answer" if row["bystander_failed"] else f"{row['longest_wait_seconds']:.2f} s"
        table.add_row(row["request"][:70], str(row["status"] or "-"), f"{row['seconds']:.2f}", waited)
    return table
