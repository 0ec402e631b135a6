"""Runs the whole service on this machine while a block runs, and starts it again when a part of it has failed.

The service is a process of its own (``service_process``), with a Ray cluster below it. Here it is watched from outside, since
what watches must outlive what it watches. Nothing is lost with it: jobs continue from their commits.
"""

import fcntl
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from ipaddress import ip_address
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from time import monotonic, sleep
from typing import NoReturn

import httpx
import psutil
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from chainfed_ray.activity import Activity, Listener, no_listener
from chainfed_ray.api.command.service_process import READY_SECONDS, STOP, RayAnswered, Ready, address_of, run
from chainfed_ray.api.operator.open_ports import SERVICE_OF
from chainfed_ray.api.serve.haproxy import environment as haproxy
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.draining import Drain
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.pool.ray_watch import PATIENCE_SECONDS, RayWatch, runs
from chainfed_ray.cluster.storage import Settings, WithoutKeys
from chainfed_ray.cluster.tracing import check_tracing
from chainfed_ray.device.removal import temporary_folder
from chainfed_ray.errors import ChainFedError, InvalidSetting, ServiceNotStarted, StorageInUse
from chainfed_ray.units import format_seconds

_PAUSES = (0.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try to start; after the last one there is none
_STEADY_SECONDS = 60.0  # a service that answered for as long is started again at once
_LOOK_SECONDS = 1.0  # between two looks at the processes
_ANSWER_SECONDS = 10.0  # for one health check; a machine that is busy with other work takes seconds
_STOP_SECONDS = 15.0  # to stop when everything is drained
_DATABASE_SECONDS = 5.0  # between two questions to a database that does not answer

Tell = Callable[[str], None]
"""Is told in a line what has failed, and what is done about it."""


def silent(_: str) -> None:
    """The default of ``Tell``."""


@contextmanager
def local_service(
    settings: Settings,
    host: str,
    port: int,
    listen: Listener = no_listener,
    tell: Tell = silent,
    insecure: bool = False,
) -> Iterator["LocalService"]:
    """Start the service, yield it once every part answers, and stop it when the block ends, with all its processes.

    ``listen`` hears what the start is busy with, and ``tell`` each failure and what is done about it, in a line. With
    ``insecure``, whoever reaches the service may use it, as long as no key was made.

    Raises:
        StorageInUse: another service uses the same storage folder.
        InvalidSetting: ``host`` is an address of the network, no key was made, and it is not ``insecure``.
        InvalidSetting: another program listens on the port, or the database does not answer.
        PackageMissing: traces are asked for, and what exports them is not installed.
        ServiceNotStarted: Ray, Ray Serve or a part of the service did not start, try after try.
    """
    check_tracing()
    # HAProxy's sockets have long names, and the path of a socket has 107 bytes at most: so not in TMPDIR.
    with _alone(settings), temporary_folder("haproxy-", "/tmp") as private:
        _end_left_overs(settings)
        check_port(host, port)
        _check_database(settings.storage.database)
        settings = replace(settings, without_keys=_without_keys(settings, host, insecure, tell))
        service = LocalService(settings, host, port, private, tell)
        try:
            service.start(listen)
            yield service
        finally:
            service.stop()


class LocalService:
    """The service on this machine: one process, and all those below it."""

    def __init__(self, settings: Settings, host: str, port: int, private: Path, tell: Tell) -> None:
        self.address = address_of(host, port)
        self._settings, self._host, self._port, self._private = settings, host, port, private
        self._tell = tell
        self._process: SpawnProcess | None = None
        self._ray: RayWatch | None = None  # once it is ready
        self._failures = 0  # in a row, each soon after the start before
        self._http = httpx.Client(base_url=self.address, timeout=_ANSWER_SECONDS, trust_env=False)

    def start(self, listen: Listener = no_listener) -> None:
        """Start the service. A start that fails, as on a busy machine, is tried again after a pause.

        Raises:
            InvalidSetting: it cannot start with these settings.
            ServiceNotStarted: it did not start, try after try.
        """
        for pause in _PAUSES:
            try:
                return self._start_once(listen)
            except ServiceNotStarted as error:
                self._end()
                self._pause("The service did not start", error.reason, pause)
        try:
            self._start_once(listen)
        except ServiceNotStarted as error:
            raise ServiceNotStarted(self.address, f"{error.reason} (the last of {len(_PAUSES) + 1} tries)") from None

    def watch(self) -> NoReturn:
        """Start the service again whenever a part of it has failed that Ray does not make again.

        One that fails soon after it was started waits longer each time, and is never given up: it could be started.

        Raises:
            ServiceNotStarted: it could not be started, try after try.
        """
        while True:
            began = monotonic()
            reason = self._wait_for_failure()
            failed = monotonic()
            self._end()
            if failed - began > _STEADY_SECONDS:
                self._failures = 0
            self._pause("The service has failed", reason, _PAUSES[self._failures])
            self._failures = min(self._failures + 1, len(_PAUSES) - 1)
            self._wait_for_database()
            self.start()
            self._tell(f"The service answers again, after {format_seconds(monotonic() - failed)}. Its jobs go on.")

    def stop(self) -> None:
        """End the service in order, if it runs, and then whatever is left of it."""
        if self._process and self._ray:
            with suppress(OSError):  # it has ended
                self._owned.send(STOP)
            self._process.join(self._settings.grace_seconds + _STOP_SECONDS)
        self._end()
        self._http.close()

    def _start_once(self, listen: Listener) -> None:
        Drain(self._settings.storage.root).end()
        context = multiprocessing.get_context("spawn")
        self._owned, theirs = context.Pipe()
        arguments = (self._settings, self._environment(), self._host, self._port, theirs)
        self._process = context.Process(target=run, args=arguments, name="chainfed service")
        self._process.start()
        theirs.close()
        ends = monotonic() + READY_SECONDS
        while self._owned.poll(max(ends - monotonic(), 0)):
            try:
                said = self._owned.recv()
            except (EOFError, OSError):
                log = self._settings.storage.root / "service.log"
                raise ServiceNotStarted(self.address, f"its process has ended; {log} may say why") from None
            match said:
                case Activity():
                    listen(said)
                case ChainFedError():
                    raise said
                case Ready():
                    self._ray = RayWatch(said.core)
                    return
        raise ServiceNotStarted(self.address, f"it is not ready after {READY_SECONDS:g} s")

    def _environment(self) -> dict[str, str]:
        """Ray's own settings. Each start has other ports, since any program may have taken one of the last start's."""
        return {
            SERVICE_OF: str(self._settings.storage.root),
            **haproxy(self._private),
            # Draining gives load balancers time to notice that a machine stops. Here there is only one machine.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a lost HAProxy is noticed by the third check
            # A replica that hangs is given no time to answer whom it has: it does not hear that it is to end.
            "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
            # Two services on one machine must not use the same ports. HAProxy opens two more ports of its own. The proxy behind
            # it opens its port shared: with the same port, the kernel would hand one service's requests to the other.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port("0.0.0.0")),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port("0.0.0.0")),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port("0.0.0.0")),
        }

    def _wait_for_failure(self) -> str:
        """Watch the service, and tell what has failed."""
        looked, unanswered = monotonic(), 0.0
        assert self._process, "it was started"
        assert self._ray, "and was ready"
        while not wait([self._process.sentinel], _LOOK_SECONDS):
            # Of a longer time between two looks the rest counts nothing: this process was stopped, or the machine was.
            unanswered += min(monotonic() - looked, 2 * _ANSWER_SECONDS)
            looked = monotonic()
            for said in self._said_of_ray():
                self._ray.hear(said.hears_of_machine)
            if failure := self._ray.failure():
                return failure
            if self._answers():
                unanswered = 0.0
            elif unanswered > PATIENCE_SECONDS:
                return f"it has not answered for {format_seconds(unanswered)}"
        return "its process has ended"

    def _said_of_ray(self) -> Iterator[RayAnswered]:
        """What the service has said of Ray since it was asked last."""
        with suppress(EOFError, OSError):  # it has ended
            while self._owned.poll():
                if isinstance(said := self._owned.recv(), RayAnswered):
                    yield said

    def _answers(self) -> bool:
        try:
            return self._http.get("/healthz").is_success
        except httpx.TransportError:
            return False

    def _pause(self, what: str, reason: str, pause: float) -> None:
        """Wait before another try."""
        self._tell(f"{what}: {reason}. Starting it again" + (f" in {pause:g} s." if pause else "."))
        sleep(pause)

    def _wait_for_database(self) -> None:
        """A database that does not answer is waited for: it is not the service that has failed."""
        told = False
        while True:
            try:
                _check_database(self._settings.storage.database, existing=True)
                return
            except InvalidSetting as error:
                if not told:
                    self._tell(f"Waiting for the database: {error}.")
                told = True
                sleep(_DATABASE_SECONDS)

    def _end(self) -> None:
        """Kill every process of the service."""
        self._ray, session = None, None
        if self._process:
            session = self._process.pid
            self._process.kill()
            self._process.join()
            self._owned.close()
        _end_left_overs(self._settings, session)


def free_port(host: str) -> int:
    """A port of ``host`` on which no program listens now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """Hold the storage's lock, so that one service at a time uses it. The kernel frees the lock even after SIGKILL."""
    with (settings.storage.root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageInUse(str(settings.storage.root)) from None
        yield


def _end_left_overs(settings: Settings, session: int | None = None) -> None:
    """Kill the processes of this storage's service, which may have lost those that started them.

    We hold the storage's lock, so no other service of this storage runs: they are ours, or those of an earlier one. Of ours
    the ``session`` is known. Ray's agents write their titles over the variables by which others are known.
    """
    while found := [process for process in psutil.process_iter() if _is_of(process, settings, session)]:
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, _STOP_SECONDS)


def _is_of(process: psutil.Process, settings: Settings, session: int | None) -> bool:
    """Whether a process runs that was started by a service of this storage."""
    try:
        if session is not None and os.getsid(process.pid) == session:
            return runs(process)
        return process.environ().get(SERVICE_OF) == str(settings.storage.root)
    except (psutil.Error, ProcessLookupError):  # it has ended, or belongs to another user
        return False


def _without_keys(settings: Settings, host: str, insecure: bool, tell: Tell) -> WithoutKeys:
    """Who is answered as long as no key was made. Others are told."""
    keys = KeyStore(settings.storage.database)
    try:
        if keys.keys():
            return "nobody"
    finally:
        keys.close()
    if insecure:
        tell("No key was made, so whoever reaches the service may use it, and run jobs that read this machine's files.")
        return "anyone"
    if not _is_loopback(host):
        expected = (
            "127.0.0.1, as long as no key was made: whoever reaches the service could run jobs that read this machine's "
            "files. `chainfed keys create` makes a key, and --insecure does without"
        )
        raise InvalidSetting("--host", host, expected)
    tell("No key was made, so the service answers to this machine alone, and to whoever uses it.")
    return "loopback"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def check_port(host: str, port: int) -> None:
    """Check that a program may listen there.

    Raises:
        InvalidSetting: it may not.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidSetting("--host and --port", f"{host}:{port}", f"an address to listen on ({error})") from None


def _check_database(url: str, existing: bool = False) -> None:
    try:
        JobStore(url, existing).close()
    except DBAPIError as error:
        shown = make_url(url).render_as_string()  # without the password
        raise InvalidSetting("CHAINFED_DATABASE", shown, f"a database that answers ({error.orig})") from None
