"""Runs a Ray cluster of this process alone while a block runs."""

import logging
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib import import_module
from typing import Any

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.cluster.resources import one_machine_resources
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.device import setup_worker
from chainfed_ray.errors import InvalidSetting, ServiceNotStarted

_TRIES = 3


@contextmanager
def local_ray(settings: Settings, environment: Mapping[str, str], listen: Listener = no_listener) -> Iterator[None]:
    """Start Ray with the variables of ``environment`` in all its processes, and stop it when the block ends.

    Ray listens on loopback only, and accepts connections only with a secret that is made here. It reads both when it is first
    imported, so nothing may import Ray earlier. Its messages stay in its own logs, because our standard output is for the
    answers of commands.

    Raises:
        ServiceNotStarted: Ray did not start, try after try.
        RuntimeError: Ray was imported before.
    """
    if "ray" in sys.modules:
        raise RuntimeError("ray was imported before local_ray could set its environment")
    Reporter("starting Ray on this machine", listen).begin()
    os.environ |= {
        **settings.environment(),
        **environment,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # without clusters of several machines, Ray uses loopback, on Linux too
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Ray starts a process for each core beforehand. Ours are forks of another process, so nobody would use them.
        "RAY_prestart_worker_first_driver": "0",
    }
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        import ray

        try:
            _start(settings, listen)
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)  # restore ours: Ray's handler would abort the process
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def lean_ray() -> Iterator[None]:
    """Let the Ray that is started while the block runs load less: one machine needs neither an autoscaler nor a reader of logs.

    Each of its processes is prepared by our ``setup_worker``, which spares it a second of CPU time. Ray has settings for all
    three, and none that can be reached through ``ray.init``.
    """
    module: Any = import_module("ray._private.parameter")
    whole = module.RayParams
    module.RayParams = partial(
        whole, no_monitor=True, include_log_monitor=False, setup_worker_path=setup_worker.__file__
    )
    try:
        yield
    finally:
        module.RayParams = whole


def _start(settings: Settings, listen: Listener) -> None:
    """Start Ray, and again if it does not come up in its time: on a busy machine the next try may."""
    import ray

    for left in reversed(range(_TRIES)):
        try:
            with lean_ray():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    namespace="chainfed",
                    resources=one_machine_resources(settings.client_slots, settings.parallel_jobs),
                )
            return
        except Exception as error:
            if isinstance(error, OSError) and "AF_UNIX" in str(error):
                expected = "a shorter path: Ray's sockets are in it, and the path of a socket has 107 bytes at most"
                raise InvalidSetting("TMPDIR", tempfile.gettempdir(), expected) from None
            ray.shutdown()  # what has started of it
            logging.getLogger(__name__).warning("Ray did not start", exc_info=True)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if not left:
                tries = f"{_TRIES} tries, and the machine may be too busy for it, or out of memory"
                raise ServiceNotStarted(None, f"{reason} ({tries})") from None
            Reporter(f"starting Ray on this machine again ({reason})", listen).begin()


def hear_at_own_address() -> None:
    """Let this replica of Ray Serve hear other processes at its machine's address in the cluster: on one machine, loopback.

    Ray opens a port on every interface for it, and has no setting for that.
    """
    from ray.util import get_node_ip_address

    replica: Any = import_module("ray.serve._private.replica")
    own: str = get_node_ip_address()  # type: ignore[no-untyped-call]
    add_port, host = replica.add_port_to_grpc_server, f"[{own}]" if ":" in own else own

    def add(server: Any, address: str) -> Any:
        return add_port(server, f"{host}:{address.rpartition(':')[2]}")

    replica.add_port_to_grpc_server = add
