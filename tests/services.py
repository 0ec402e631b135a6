"""Runs `chainfed serve` for tests, in a process of its own, as an operator does."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from chainfed_ray.api.command.local_service import free_port
from chainfed_ray.api.sdk.clients import Client
from tests.project import COMMAND, ROOT
from tests.watching import command_of, processes_below, running

DEADLINE = 120.0


class Running:
    """`chainfed serve` in a process of its own. ``settings`` are further variables of its environment."""

    def __init__(self, storage: Path, port: int | None = None, settings: Mapping[str, str] | None = None) -> None:
        self.storage, self.port = storage, port or free_port("127.0.0.1")
        environment = {**os.environ, "CHAINFED_STORAGE": str(storage), "CHAINFED_CLIENT_SLOTS": "1"}
        environment |= {"PYTHONPATH": str(ROOT)} | dict(settings or {})
        self.process = subprocess.Popen(
            [*COMMAND, "serve", "--port", str(self.port), "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        said = json.loads(self.process.stdout.readline() or "{}")
        if "address" not in said:  # it ends, and this is why
            self.process.wait(DEADLINE)
            self.process.stdout.close()
            pytest.fail(f"the service did not start: {said}")
        self.address: str = said["address"]
        self.client = Client(self.address)

    def processes(self, name: str) -> list[psutil.Process]:
        """The processes of the service whose command line has ``name``.

        They are below it, or forks whose fork server was killed: those have another parent, and the secret of its Ray.
        """
        below = processes_below("", pid=self.process.pid)
        secrets = set(filter(None, map(_secret_of, below)))
        others = (process for process in psutil.process_iter() if process not in below)
        found = [*below, *(process for process in others if _secret_of(process) in secrets)]
        return [process for process in found if name in command_of(process)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.stop()

    def stop(self) -> None:
        """As an operator does, and then nothing is left of it."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        self.close()
        assert self.process.returncode == 0
        psutil.wait_procs(below, DEADLINE)
        assert not running(below)

    def close(self) -> None:
        """Wait for the end of the process, and let go of it."""
        self.client.close()
        self.process.wait(DEADLINE)
        assert self.process.stdout is not None
        assert self.process.stdout.read() == "", "only what was asked for"
        self.process.stdout.close()

    def chainfed(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """The exit code of a command, and its JSON."""
        command = [*COMMAND, *arguments, "--address", self.address, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert "Traceback" not in done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return done.returncode, answer


def _secret_of(process: psutil.Process) -> str | None:
    """The secret of the Ray cluster that a process is of; None if it is of none, or has ended."""
    with suppress(psutil.Error):
        return process.environ().get("RAY_AUTH_TOKEN")
    return None


def listening(running: Running) -> set[int]:
    """The ports of a service. All are on loopback."""
    found = set()
    for process in [psutil.Process(running.process.pid), *running.processes("")]:
        try:
            addresses = [one.laddr for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:  # it has ended since
            continue
        assert all(address.ip.removeprefix("::ffff:") == "127.0.0.1" for address in addresses), command_of(process)
        found |= {address.port for address in addresses}
    return found
