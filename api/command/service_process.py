"""The process that runs the service: Ray, and the REST API on Ray Serve, until its owner says so or is gone.

The owner (``local_service``) starts it, watches it, and starts another when it has failed.
"""

import logging
import os
import re
import sys
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any

import psutil

from chainfed_ray.activity import Listener, Reporter
from chainfed_ray.api.sdk import calls
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.cluster.draining import Drain
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.local_ray import local_ray
from chainfed_ray.cluster.occupancy import is_free
from chainfed_ray.cluster.pool.ray_watch import ASK_SECONDS, core_processes, hears_of_machine
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.errors import ChainFedError, InvalidSetting, ServiceNotStarted
from chainfed_ray.records.states import AT_WORK

READY_SECONDS = 240.0  # an idle machine needs 20 s; one that is busy with other work needs far longer
_POLL_SECONDS = 0.2
_NAME = "chainfed"  # of the application on Ray Serve
_MOST_JOBS = 1000  # at work
_REASON = 300  # characters of an error of Ray's, which may have pages


@dataclass(frozen=True)
class Ready:
    """The service answers. ``core`` has the ids of the processes of Ray without which it ends, by their names."""

    core: dict[str, int]


@dataclass(frozen=True)
class RayAnswered:
    """Ray has answered, and said whether it hears of its machine, whose raylet is a process of its own."""

    hears_of_machine: bool


STOP = "stop"  # what the owner sends to end the service in order


def run(settings: Settings, environment: dict[str, str], host: str, port: int, owner: "Connection[Any, Any]") -> None:
    """Run the service, and tell ``owner`` what is done, then ``Ready``, or the error for which it did not start."""
    os.setsid()  # Ctrl-C is for the owner, who ends the service in order
    os.umask(0o077)  # what the service and Ray write anywhere is for this user alone
    _write_output_to(settings.storage.root / "service.log")
    stop = Event()
    Thread(target=_heed, args=(owner, stop), daemon=True).start()
    address = address_of(host, port)
    try:
        with local_ray(settings, environment, owner.send):
            from ray import serve

            try:
                _start(settings, host, port, address, owner.send)
                owner.send(Ready(core_processes()))
                asking = Thread(target=_ask_ray, args=(owner, stop), daemon=True)
                asking.start()
                stop.wait()
                asking.join(ASK_SECONDS)  # or it would ask a Ray that is being stopped
                _drain(settings)
            finally:
                serve.shutdown()  # type: ignore[no-untyped-call]
                Drain(settings.storage.root).end()
    except InvalidSetting as error:
        owner.send(error)
    except Exception as error:  # whatever it is, another try may do: a port was taken, the machine was busy
        logging.getLogger(__name__).exception("the service did not start")
        owner.send(ServiceNotStarted(address, _brief(error)))


def _ask_ray(owner: "Connection[Any, Any]", stop: Event) -> None:
    """Tell the owner again and again that Ray answers. Where a process of Ray's hangs and does not end, no answer comes."""
    from ray import serve

    while not stop.wait(ASK_SECONDS):
        with suppress(Exception):  # Ray's own time for an answer is over, or the owner is gone
            if is_whole := hears_of_machine():
                serve.status()  # of Serve's controller
            owner.send(RayAnswered(is_whole))


def _drain(settings: Settings) -> None:
    """Let what was begun be done: requests are answered, and running jobs stop after a commit. It takes so long at most."""
    from ray import serve

    ends = monotonic() + settings.grace_seconds
    try:
        Drain(settings.storage.root).begin()
        sleep(_POLL_SECONDS)  # what was let in before has asked the models by then
        serve.delete(_NAME, _blocking=False)  # its processes end when they have answered
        with closing(JobStore(settings.storage.database, existing=True)) as store:
            at_work = [settings.storage.job(job.id) for job in store.page(limit=_MOST_JOBS, status=AT_WORK)]
        while monotonic() < ends and (_NAME in serve.status().applications or not all(map(is_free, at_work))):
            sleep(_POLL_SECONDS)
    except Exception:  # whatever it is, the service ends, and its jobs go on from their commits
        logging.getLogger(__name__).exception("the service did not end in order")


def address_of(host: str, port: int) -> str:
    """The address at which this machine reaches the service."""
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def _heed(owner: "Connection[Any, Any]", stop: Event) -> None:
    """Wait for the owner's word. An owner that was killed leaves none: then everything ends at once."""
    try:
        owner.recv()
    except (EOFError, OSError):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(1)
    stop.set()


def _start(settings: Settings, host: str, port: int, address: str, listen: Listener) -> None:
    Reporter("starting the REST API on Ray Serve", listen).begin()
    from ray import serve

    from chainfed_ray.api.serve.deployment import build

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    form = "JSON" if settings.json_logs else "TEXT"
    serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR", "encoding": form})
    serve.run(build({}), name=_NAME, route_prefix="/")
    Reporter("waiting for every part of the service", listen).begin()
    _wait_until_ready(address)


def _wait_until_ready(address: str) -> None:
    ends = monotonic() + READY_SECONDS
    with Client(address) as client:
        while wrong := _wrong(client):
            if monotonic() > ends:
                raise ServiceNotStarted(address, f"it is not ready after {READY_SECONDS:g} s: {wrong}")
            sleep(_POLL_SECONDS)


def _wrong(client: Client) -> str:
    """What of the service does not work. Database and storage are waited for while it runs, so they may be away."""
    try:
        checks = client.send(calls.readyz()).checks
    except ChainFedError as error:
        return str(error)
    waited_for = ("database", "storage")
    return "; ".join(f"{part}: {state}" for part, state in checks.items() if state != "ok" and part not in waited_for)


def _write_output_to(log: Path) -> None:
    """Let what this process and Ray's print go to a file: the terminal is the owner's."""
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def _brief(error: Exception) -> str:
    """An error of Ray's in a sentence: the end of its text, which has the cause."""
    words = error.reason if isinstance(error, ServiceNotStarted) else str(error) or type(error).__name__
    line = re.sub(r"\s+", " ", words).strip()
    return line if len(line) <= _REASON else f"… {line[-_REASON:]}"
