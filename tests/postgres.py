"""Starts a real PostgreSQL server for the tests, which listens on its own socket only."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

_DEADLINE = 60.0
_NAME = "chainfed"
_LOCALE = ("--no-locale", "--encoding", "UTF8")  # whatever locale this process has, which may not be there


def installed() -> Path | None:
    """The folder of the server's programs, None if it is not installed. Debian keeps the folder off the PATH."""
    found = [*map(Path, filter(None, [shutil.which("initdb")])), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return found[-1].parent if found else None


@contextmanager
def server(programs: Path) -> Iterator[str]:
    """Start a server, and give the URL of a database in it."""
    # PostgreSQL refuses to run as root, and in a container root runs the tests.
    other: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="chainfed-") as folder:
        if other:
            shutil.chown(folder, **other)
        quiet: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **other}
        data = f"{folder}/data"
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", _NAME, "-A", "trust", "--no-sync", *_LOCALE], check=True, **quiet
        )
        # The server listens on a socket in the folder, and on no network address.
        command = [programs / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses="]
        with subprocess.Popen(command, **quiet) as process:
            try:
                ends = monotonic() + _DEADLINE
                create = [programs / "createdb", "-h", folder, "-U", _NAME, _NAME]
                while subprocess.run(create, check=False, **quiet).returncode:
                    assert monotonic() < ends, "PostgreSQL did not start"
                    sleep(0.1)
                yield f"postgresql+psycopg://{_NAME}@/{_NAME}?host={folder}"
            finally:
                process.send_signal(
                    signal.SIGINT
                )  # fast: SIGTERM would wait for connections that a failed test left open
