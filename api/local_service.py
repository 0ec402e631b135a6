"""The whole service on this machine: a Ray cluster of its own, with the API on it, for as long as a block runs."""

import fcntl
import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep

from api.client import ServiceClient
from chainfed_ray.errors import ChainFedError, InvalidSetting, ServiceUnavailable, StorageInUse
from cluster.resources import of_one_machine
from cluster.storage import Settings

_READY_SECONDS = 120.0
_POLL_SECONDS = 0.2


@contextmanager
def local_service(settings: Settings, host: str, port: int) -> Iterator[str]:
    """Start the service and give its address once every part of it answers; end it with the block.

    Raises:
        StorageInUse: another service works in the same folder.
        InvalidSetting: the port cannot be listened on.
        ServiceUnavailable: the service did not come up.
    """
    with _alone(settings), local_ray(settings):
        _check_port(host, port)
        from ray import serve

        from api.deployment import build

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})
            serve.run(build({}), name="chainfed", route_prefix="/")
            address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
            _wait_until_ready(address)
            yield address
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def local_ray(settings: Settings) -> Iterator[None]:
    """A Ray cluster of this process alone, which ends with the block. Its ports answer to nobody without its secret.

    Ray reads its secret when it is first imported, so nothing may have imported it before.
    """
    if "ray" in sys.modules:
        raise RuntimeError("ray was imported before local_ray could set its environment")
    os.environ |= {
        **settings.environment(),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
    }
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace="chainfed",
        resources=of_one_machine(settings.client_slots, settings.parallel_jobs),
    )
    try:
        yield
    finally:
        ray.shutdown()


def free_port(host: str) -> int:
    """A port of ``host`` on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """Hold the storage's lock. The kernel takes it back when this process ends, however it ends."""
    with (settings.storage.root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageInUse(str(settings.storage.root)) from None
        yield


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidSetting("--host and --port", f"{host}:{port}", f"an address to listen on ({error})") from None


def _wait_until_ready(address: str) -> None:
    client, ends = ServiceClient(address), monotonic() + _READY_SECONDS
    try:
        while True:
            try:
                client.ready()
                return
            except ChainFedError as error:
                if monotonic() > ends:
                    raise ServiceUnavailable(address, f"not ready after {_READY_SECONDS:g} s: {error}") from None
            sleep(_POLL_SECONDS)
    finally:
        client.close()
