"""A site that takes part in a job: ``chainfed join`` as people start it, by what starts it again whenever it ends.

So does systemd, or Kubernetes, at a site that people leave running.
"""

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self

import numpy as np
import psutil

from chainfed_ray.planning.prepare import PlannedJob, prepare_job
from chainfed_ray.spec.parse import parse_job
from tests.project import COMMAND, ROOT

SITE, CLIENTS = "north", 4
_FILE = "notes.jsonl"
_HELD_OUT = 12  # rows for validation, and as many for the test
_PAUSE_SECONDS, _DEADLINE = 1.0, 60.0


class SupervisedSite:
    """The site of the key, which joins the service at ``address`` with the rows in ``data`` until the block ends."""

    def __init__(self, address: str, key: str, data: Path) -> None:
        data.mkdir(exist_ok=True)
        cache = ["--cache", str(data.with_name("cache-of-site")), "--split", str(CLIENTS), "--allow-models", "*"]
        self._command = [*COMMAND, "join", address, "--site", SITE, "--data", str(data), *cache]
        self._environment = {**os.environ, "CHAINFED_SITE_KEY": key, "PYTHONPATH": str(ROOT)}
        self._over, self._thread = Event(), Thread(target=self._supervise)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._process:
            self._process.terminate()
        self._thread.join(_DEADLINE)

    def asking(self) -> list[psutil.Process]:
        """The process that asks the service for orders, if it runs."""
        with suppress(psutil.NoSuchProcess):
            return [psutil.Process(self._process.pid)] if self._process and self._process.poll() is None else []
        return []

    def training(self) -> list[psutil.Process]:
        """The processes below it."""
        with suppress(psutil.NoSuchProcess):
            return [below for process in self.asking() for below in process.children(recursive=True)]
        return []

    def _supervise(self) -> None:
        quiet = subprocess.DEVNULL
        while not self._over.is_set():
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=quiet, stderr=quiet)
            if self._over.is_set():  # the block ended meanwhile
                self._process.terminate()
            self._process.wait()
            self._over.wait(_PAUSE_SECONDS)


def at_the_site(document: dict[str, Any], rows: Path, folder: Path) -> dict[str, Any]:
    """The job of ``document`` whose clients are made of a file at the site, and whose whole model DeepSpeed evaluates.

    The files are written, each below ``folder``. The service may read all but the site's.
    """
    lines = rows.read_text().splitlines()
    ends = len(lines) - 2 * _HELD_OUT
    files = {"train": lines[:ends], "validation": lines[ends:-_HELD_OUT], "test": lines[-_HELD_OUT:]}
    for name, part in files.items():
        place = folder / "site" / _FILE if name == "train" else folder / f"{name}.jsonl"
        place.parent.mkdir(exist_ok=True)
        place.write_text("\n".join(part))
    made: dict[str, Any] = json.loads(json.dumps(document)) | {"name": "hurt-at-a-site"}
    del made["data"]["train"]
    made["data"] |= {name: f"path:{folder / name}.jsonl" for name in ("validation", "test")}
    made["fleet"]["clients"] = [{"name": "far", "memory": "64MiB", "site": SITE, "data": f"site:{_FILE}"}]
    made["evaluation"] = {"whole_every": "round", "engine": "deepspeed"}
    return made


def dealt_by_the_server(document: dict[str, Any], folder: Path) -> PlannedJob:
    """The same job where the server deals the rows of the site, which changes no bit."""
    dealt: dict[str, Any] = json.loads(json.dumps(document))
    dealt["data"] |= {"train": f"path:{folder / 'site' / _FILE}"}
    dealt["fleet"]["clients"] = [{"name": "far", "count": CLIENTS, "memory": "64MiB"}]
    dealt["evaluation"] |= {"whole_every": "never", "engine": "torch"}
    return prepare_job(parse_job(dealt), folder / "scratch-of-site", partition=_by_turns)


def _by_turns(labels: np.ndarray, groups: object, clients: int, seed: int) -> list[np.ndarray]:
    """As a site makes several clients of a file."""
    return [np.arange(place, len(labels), clients) for place in range(clients)]
