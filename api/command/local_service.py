"""Runs the whole service on this machine while a block runs: a Ray cluster of its own, with the REST API on it."""

import fcntl
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep

import psutil
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.api.command.client import ServiceClient
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.local_ray import local_ray
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.errors import ChainFedError, InvalidSetting, ServiceNotStarted, StorageInUse

_READY_SECONDS = 240.0  # an idle machine needs 20 s; one that is busy with other work needs far longer
_POLL_SECONDS = 0.2
_OWNER = "CHAINFED_SERVICE_OF"  # set to the storage folder in every process of a service, to find them later


@contextmanager
def local_service(settings: Settings, host: str, port: int, listen: Listener = no_listener) -> Iterator[str]:
    """Start the service, yield its address once every part answers, and stop the service when the block ends.

    Raises:
        StorageInUse: another service uses the same storage folder.
        InvalidSetting: another program listens on the port, or the database does not answer.
        ServiceNotStarted: Ray, Ray Serve or a part of the service did not start.
    """
    with _alone(settings):
        _end_orphans(settings)
        _check_port(host, port)
        _check_database(settings.storage.database)
        with local_ray(settings, _environment(settings), listen):
            from ray import serve

            address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
            try:
                _start(host, port, address, listen)
                yield address
            finally:
                serve.shutdown()  # type: ignore[no-untyped-call]


def _environment(settings: Settings) -> dict[str, str]:
    return {
        _OWNER: str(settings.storage.root),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # Draining gives load balancers time to notice that a machine stops. Here there is only one machine.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        # Two services on one machine must not use the same ports. HAProxy opens two more ports of its own. The proxy behind it
        # opens its port shared: with the same port, the kernel would hand one service's requests to the other.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port("0.0.0.0")),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port("0.0.0.0")),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port("0.0.0.0")),
    }


def _start(host: str, port: int, address: str, listen: Listener) -> None:
    Reporter("starting the REST API on Ray Serve", listen).begin()
    from ray import serve

    from chainfed_ray.api.serve.deployment import build

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})
        serve.run(build({}), name="chainfed", route_prefix="/")
    except RuntimeError as error:  # errors of Ray Serve, and of Ray's other processes, are of this kind
        raise ServiceNotStarted(address, str(error)) from error
    Reporter("waiting for every part of the service", listen).begin()
    _wait_until_ready(address)


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


def _end_orphans(settings: Settings) -> None:
    """Kill processes that an earlier, killed service left behind. HAProxy outlives Ray, and would keep its port for ever.

    We hold the storage's lock, so no other service of this storage runs: its processes must be left-overs.
    """
    orphans = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_OWNER) == str(settings.storage.root):
                process.kill()
                orphans.append(process)
        except psutil.Error:  # the process has ended, or belongs to another user
            continue
    psutil.wait_procs(orphans)


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidSetting("--host and --port", f"{host}:{port}", f"an address to listen on ({error})") from None


def _check_database(url: str) -> None:
    try:
        JobStore(url).close()
    except DBAPIError as error:
        shown = make_url(url).render_as_string()  # without the password
        raise InvalidSetting("CHAINFED_DATABASE", shown, f"a database that answers ({error.orig})") from None


def _wait_until_ready(address: str) -> None:
    client, ends = ServiceClient(address), monotonic() + _READY_SECONDS
    try:
        while True:
            try:
                client.ready()
                return
            except ChainFedError as error:
                if monotonic() > ends:
                    raise ServiceNotStarted(address, f"it is not ready after {_READY_SECONDS:g} s: {error}") from None
            sleep(_POLL_SECONDS)
    finally:
        client.close()
