"""Runs a Ray cluster of this process alone while a block runs."""

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from time import sleep, time
from typing import Any

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.cluster.occupancy import is_abandoned, occupy
from chainfed_ray.cluster.resources import one_machine_resources
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.device import setup_worker
from chainfed_ray.errors import InvalidSetting, ServiceNotStarted

_TRIES = 3
_FOLDERS = "cf-"  # how the names of Ray's folders begin: short, since the paths of its sockets must be
_REMOVALS, _PAUSE_SECONDS = 10, 0.2  # tries, and seconds between them
_KEPT_SECONDS, _MOST_KEPT = 86_400.0, 3  # how long the logs of a Ray that failed are kept, and of how many
_NEW_SECONDS = 60.0  # a folder may be another's who has not locked it yet
_OPEN = "ray"  # the folder in it that Ray opens to everybody
_INSIDE = frozenset({"in-use", _OPEN, "session", "errors.log"})


@contextmanager
def local_ray(
    settings: Settings, environment: Mapping[str, str], listen: Listener = no_listener, embedded: bool = False
) -> Iterator[None]:
    """Start Ray with the variables of ``environment`` in all its processes, and stop it when the block ends.

    With ``embedded`` it serves a program of a caller's own: Ray's processes import modules beside that program as well, as
    rules of his own may need, and standard output stays his.

    Ray listens on loopback only, and accepts connections only with a secret that is made here. It reads both when it is first
    imported, so nothing may import Ray earlier. Its messages stay in its own logs, because our standard output is for the
    answers of commands.

    Raises:
        ServiceNotStarted: Ray did not start, try after try.
        InvalidSetting: the folder for temporary files has a path that Ray cannot use.
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
    with open(os.devnull, "w") as nowhere, nullcontext() if embedded else redirect_stdout(nowhere):
        import ray

        with _folder_of_logs() as folder:
            try:
                _start(settings, folder, embedded, listen)
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


@contextmanager
def _folder_of_logs() -> Iterator[Path]:
    """The folder in which Ray has its own, with its logs and sockets. It opens those to everybody, so this one is closed.

    It is removed when the block ends in order. After a failure the logs may tell why, so it is left: a later start removes it,
    when it is a day old or when there are newer ones.
    """
    variable, place = _temporary()
    if not str(place).isascii():
        expected = "a path of ASCII characters: Ray's sockets are in it, and Ray reads no others"
        raise InvalidSetting(variable, str(place), expected)
    if not place.is_dir():
        raise InvalidSetting(variable, str(place), "a folder that exists, for temporary files")
    for newer, (age, left) in enumerate(_left_over(place)):
        if newer >= _MOST_KEPT or age > _KEPT_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    folder = _new_folder(place)
    failed = False
    try:
        with occupy(folder):
            yield folder
    except Exception:
        failed = True
        raise
    finally:
        for _ in range(0 if failed else _REMOVALS):  # a process of Ray's that ends a little later may still write there
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            sleep(_PAUSE_SECONDS)


def _temporary() -> tuple[str, Path]:
    """The folder for temporary files, and the variable that names it: as Ray chooses it, on macOS a short path at any rate."""
    if given := os.environ.get("RAY_TMPDIR"):
        return "RAY_TMPDIR", Path(given)
    return "TMPDIR", Path("/tmp" if sys.platform == "darwin" else tempfile.gettempdir())


def _left_over(place: Path) -> list[tuple[float, Path]]:
    """What Rays of this user's that have ended left in ``place``, each with its age in seconds; the youngest first.

    A removal that was broken off leaves no lock: what has none is taken for a Ray's after a day.
    """
    found = []
    for folder in place.glob(f"{_FOLDERS}{'[0-9a-f]' * 4}"):
        with suppress(OSError):  # it belongs to somebody else, or is gone
            known = folder.lstat()
            age, inside = time() - known.st_mtime, {path.name.partition("_")[0] for path in folder.iterdir()}
            ended = is_abandoned(folder) if "in-use" in inside else age > _KEPT_SECONDS
            if ended and age > _NEW_SECONDS and known.st_uid == os.getuid() and inside <= _INSIDE:
                found.append((age, folder))
    return sorted(found)


def _new_folder(place: Path) -> Path:
    """An empty folder in ``place``, for this user alone, with a name that is shorter than those of ``tempfile``."""
    while True:
        folder = place / f"{_FOLDERS}{secrets.token_hex(2)}"
        try:
            folder.mkdir(0o700)
        except FileExistsError:
            continue
        return folder


def _start(settings: Settings, folder: Path, embedded: bool, listen: Listener) -> None:
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
                    job_config=_job_config(embedded),
                    _temp_dir=str(folder / _OPEN),
                )
            return
        except Exception as error:
            if isinstance(error, OSError) and "AF_UNIX" in str(error):
                expected = (
                    "a shorter path: Ray's sockets are in it, and the path of a socket has some hundred bytes at most"
                )
                raise InvalidSetting(_temporary()[0], str(folder.parent), expected) from None
            ray.shutdown()  # what has started of it
            with (folder / "errors.log").open("a") as log:
                traceback.print_exc(file=log)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if not left:
                tries = f"{_TRIES} tries, and the machine may be too busy for it, or out of memory"
                raise ServiceNotStarted(None, f"{reason} ({tries})") from None
            Reporter(f"starting Ray on this machine again ({reason})", listen).begin()


def _job_config(embedded: bool) -> Any:
    """Ray's configuration: its processes import nothing from this process's folder or its program's, unless it is ``embedded``.

    Ray puts both first on the path of its processes, before the standard library, and has no setting for that. It leaves them
    out if the code comes with a working directory, so the configuration says that it has one.
    """
    import ray

    config: Any = ray.job_config.JobConfig()
    if not embedded:
        config._runtime_env_has_working_dir = lambda: True
    return config


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
