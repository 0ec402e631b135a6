"""Makes the runs of the accuracy benchmark, each in its own process."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from benchmarks.accuracy_cells import Run
from chainfed_ray.device.peak import ENVIRONMENT

# As ``python -m benchmarks.accuracy_cell``, without what of the libraries a run does not need.
_CELL = """
import runpy
from chainfed_ray.device.lean_imports import load_models
load_models()
runpy.run_module("benchmarks.accuracy_cell", run_name="__main__", alter_sys=True)
"""


class RunFailed(RuntimeError):
    """A run ended without a result; the message is the last line that it wrote to stderr."""


class Runner(Protocol):
    """Makes runs. Several threads may call it at the same time."""

    def __call__(self, run: Run) -> dict[str, Any]:
        """Make a run, and give the fields of its row.

        Raises:
            RunFailed: the run ended without a result.
        """
        ...

    def stop(self) -> None:
        """End the runs that are being made."""
        ...


class Processes:
    """Makes each run in its own process. The clients' caches are in temporary folders in ``scratch``."""

    def __init__(self, scratch: Path) -> None:
        self._scratch, self._stopped = scratch, False
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = Lock()

    def __call__(self, run: Run) -> dict[str, Any]:
        """Make a run (see ``Runner``)."""
        with tempfile.TemporaryDirectory(prefix="accuracy-", dir=self._scratch) as folder:
            process = self._start(run, folder)
            said, complained = process.communicate()
        with self._lock:
            self._running.discard(process)
        if process.returncode:
            raise RunFailed((complained.strip().splitlines() or [f"the run ended with {process.returncode}"])[-1])
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        return found

    def stop(self) -> None:
        """End the runs, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _start(self, run: Run, folder: str) -> "subprocess.Popen[str]":
        with self._lock:
            if self._stopped:
                raise RunFailed("the run was stopped before it began")
            process = subprocess.Popen(
                [sys.executable, "-c", _CELL, json.dumps(asdict(run)), folder],
                env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self._running.add(process)
            return process
