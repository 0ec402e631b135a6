"""Promise: the service's processes are replaced by new ones, and whoever asks meanwhile is answered.

This is what Ray Serve does when the application is deployed again, with newer code or other settings. It starts new processes,
lets requests go to them, and ends the old ones once they have answered what they were asked.
"""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any, Self

import httpx
import pytest
from rich.console import Console

from chainfed_ray.api.sdk import calls, exchanges
from tests.project import ROOT
from tests.services import DEADLINE, Running
from tests.watching import wait_for

CALLERS = 4
pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]

# The application is deployed as it was, by a process that joins the service's cluster.
AGAIN = """
import sys
import ray
from ray import serve
from chainfed_ray.api.serve.deployment import build
ray.init(address=sys.argv[1], log_to_driver=False)
serve.run(build({}), name="chainfed", route_prefix="/")
"""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path / "storage") as running:
        yield running


class Callers:
    """Ask a service for a model's answers, all the time: each in a thread, on connections that are kept and on new ones."""

    def __init__(self, address: str, model: str) -> None:
        self._address, self._body = address, {"model": model, "texts": ["one", "two"]}
        self._over, self._lock = Event(), Lock()
        self._threads = [Thread(target=self._ask, args=(place % 2 == 0,)) for place in range(CALLERS)]
        self.answers, self.longest = Counter[str](), 0.0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, keeps: bool) -> None:
        limits = httpx.Limits(max_keepalive_connections=1 if keeps else 0)
        with httpx.Client(base_url=self._address, timeout=60, trust_env=False, limits=limits) as http:
            while not self._over.is_set():
                began = monotonic()
                try:
                    answer = http.post("/v1/classify", json=self._body)
                    said = "answered" if answer.is_success else f"{answer.status_code} {answer.text[:200]}"
                except httpx.TransportError as error:
                    said = repr(error)
                with self._lock:
                    self.answers[said] += 1
                    self.longest = max(self.longest, monotonic() - began)


def address_of(service: Running) -> str:
    """Where the service's own Ray cluster is."""
    (raylet,) = service.processes("raylet/raylet")
    return next(part.partition("=")[2] for part in raylet.cmdline() if part.startswith("--gcs-address="))


def test_no_request_is_lost_while_every_process_is_replaced(service: Running, document: dict[str, Any]) -> None:
    job = service.client.json(calls.submit_job(document))
    assert list(service.client.stream_json(exchanges.events(job["id"])))[-1]["kind"] == "succeeded"
    before = {process.pid for process in service.processes("ServeReplica:chainfed")}
    environment = service.processes("ServeReplica:chainfed:Api")[0].environ()
    with Callers(service.address, job["model"]) as callers:
        wait_for(lambda: callers.answers.total() > 50, "answers")
        subprocess.run(
            [sys.executable, "-c", AGAIN, address_of(service)],
            cwd=ROOT,
            env=environment,
            check=True,
            timeout=5 * DEADLINE,
        )
        wait_for(
            lambda: not before & {process.pid for process in service.processes("ServeReplica:chainfed")}, "an end", 300
        )
        asked = callers.answers.total()
        wait_for(lambda: callers.answers.total() > asked + 50, "answers of the new processes")
    Console().print(f"\n{callers.answers.total()} answers, the slowest after {callers.longest:.1f} s")
    assert set(callers.answers) == {"answered"}, callers.answers
