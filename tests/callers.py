"""Somebody who asks a service again and again while its processes are hurt, and what those are."""

from threading import Event, Thread
from time import monotonic
from typing import Self

import httpx

GAP_SECONDS, STEADY_SECONDS = 1.0, 6.0

# What is killed → what the command line of its process has. A whole service is all of them at once.
PROCESSES = {
    "an API replica": "ServeReplica:chainfed:Api",
    "the inference replica": "ServeReplica:chainfed:Inference",
    "the controller of jobs": "ControllerActor",
    "the job's coordinator": "CoordinatorActor",
    "a client": "ClientActor",
    "a fork server": "device.fork_server",
    "what waits for a fork": "start_forked",
    "Serve's controller": "ServeController",
    "Serve's proxy": "HAProxyManager",
    "HAProxy": "haproxy -db",
    "Ray's raylet": "raylet/raylet",
    "Ray's GCS": "gcs_server",
    "the process of the service": "spawn_main",
    "every process of the service": "",
}


class Caller:
    """Asks the service again and again, and keeps the longest time without an answer."""

    def __init__(self, address: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=address, headers=headers, timeout=5, trust_env=False)
        self._over, self._thread = Event(), Thread(target=self._ask)
        self.begin()
        self.strange: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._http.close()

    def begin(self) -> None:
        """Forget what was, and measure from now on."""
        self.longest, self._answered, self._steady_since = 0.0, monotonic(), monotonic()

    def is_steady(self) -> bool:
        """Whether the service has answered without a gap for a while: long enough to notice what was killed."""
        return self._answered - self._steady_since > STEADY_SECONDS

    def _ask(self) -> None:
        while not self._over.wait(0.1):
            try:
                answer = self._http.get("/v1/jobs", params={"limit": 1})
            except httpx.TransportError:
                continue
            if answer.is_success:
                now = monotonic()
                gap, self._answered = now - self._answered, now
                self.longest = max(self.longest, gap)
                if gap > GAP_SECONDS:
                    self._steady_since = now
            elif answer.status_code < 500 or answer.headers["content-type"] != "application/problem+json":
                self.strange.append(f"{answer.status_code} {answer.headers['content-type']}: {answer.text[:200]}")
