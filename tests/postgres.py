"""Starts a real PostgreSQL server for the tests, which listens on its own socket only."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil

_DEADLINE = 60.0
_NAME = "chainfed"
_LOCALE = ("--no-locale", "--encoding", "UTF8")  # whatever locale this process has, which may not be there


def installed() -> Path | None:
    """The folder of the server's programs, None if it is not installed. Debian keeps the folder off the PATH."""
    found = [*map(Path, filter(None, [shutil.which("initdb")])), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return found[-1].parent if found else None


class Server:
    """A server with its files in ``folder``, which may be stopped and started again, or frozen for a while."""

    def __init__(self, programs: Path, folder: str) -> None:
        # PostgreSQL refuses to run as root, and in a container root runs the tests.
        other: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
        if other:
            shutil.chown(folder, **other)
        self._quiet: dict[str, Any] = {
            "cwd": folder,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
            **other,
        }
        self._programs, self._folder, data = programs, folder, f"{folder}/data"
        made = [programs / "initdb", "-D", data, "-U", _NAME, "-A", "trust", "--no-sync", *_LOCALE]
        subprocess.run(made, check=True, **self._quiet)
        # The server listens on a socket in the folder, and on no network address.
        self._command = [programs / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses="]
        self.url = f"postgresql+psycopg://{_NAME}@/{_NAME}?host={folder}"
        self.start()
        create = [programs / "createdb", "-h", folder, "-U", _NAME, _NAME]
        self._wait(lambda: not subprocess.run(create, check=False, **self._quiet).returncode)

    def start(self) -> None:
        """Start the server, which may take a moment."""
        self._process = subprocess.Popen(self._command, **self._quiet)

    def stop(self) -> None:
        """Stop it at once, also if there are connections, as its service's manager does: SIGTERM would wait for them."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(_DEADLINE)

    def freeze(self) -> None:
        """Let none of its processes run, as on a machine that hangs."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them run again."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self._process.pid)
            for process in [main, *main.children()]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def _wait(self, is_there: Callable[[], bool]) -> None:
        ends = monotonic() + _DEADLINE
        while not is_there():
            assert monotonic() < ends, "PostgreSQL did not start"
            sleep(0.1)


@contextmanager
def server(programs: Path) -> Iterator[Server]:
    """Start a server with a database in it."""
    with tempfile.TemporaryDirectory(prefix="chainfed-") as folder:
        started = Server(programs, folder)
        try:
            yield started
        finally:
            started.thaw()
            started.stop()
