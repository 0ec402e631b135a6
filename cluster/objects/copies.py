"""Copies of what jobs have committed to an object store, for processes that only read: the API, and those with models.

A copy is a folder of its own for each commit, so who reads in one is not disturbed by the next. The commits' tensors, which
only coordinators read, are left out. All copies of a machine share a number of bytes: the oldest make room. ::

    copies/<job>/<number>/…
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from time import monotonic, time

from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.snapshots import Damaged, Snapshot, Snapshots

_LOOK_SECONDS = 1.0  # until the store is asked again for a newer commit of the same job
_MOST_BYTES = 2 * 2**30  # of copies on a machine
_IN_USE_SECONDS = 600.0  # since a copy was asked for: somebody may still read it
_KNOWN_JOBS = 10_000
_ROUNDS, _LAST = "rounds/", "finished.json"
_log = logging.getLogger(__name__)


class Copies:
    """The copies below ``root``. Safe to use from several threads and processes."""

    def __init__(self, objects: ObjectStore, root: Path, most_bytes: int = _MOST_BYTES) -> None:
        self._objects, self._root, self._most_bytes = objects, root, most_bytes
        self._looked: dict[
            str, tuple[float, int]
        ] = {}  # when the store was asked for a job's newest commit, and which it was

    def folder(self, job: str, at_once: bool = False) -> Path:
        """The folder of what a job has committed, a second ago at most; with ``at_once``, now. It is not there without commits.

        Raises:
            OSError: the store is away, or the disk.
        """
        when, number = self._looked.get(job, (float("-inf"), 0))
        place = self._root / job / f"{number}"
        is_last = (place / _LAST).exists()  # nothing comes after it
        if is_last or (not at_once and monotonic() - when < _LOOK_SECONDS and place.exists()):
            return place
        found = self._copied(job, number)
        self._looked[job] = monotonic(), found
        if len(self._looked) > _KNOWN_JOBS:
            self._looked.clear()
        return self._root / job / f"{found}"

    def _copied(self, job: str, known: int) -> int:
        """The number of the newest whole commit, of which there is a copy now; 0 if there is none."""
        snapshots = Snapshots(self._objects, job)
        for number in [*snapshots.numbers(after=known), *([known] if known else [])]:
            place = self._root / job / f"{number}"
            if place.exists():
                with suppress(OSError):
                    os.utime(place)  # it is in use
                return number
            try:
                self._copy(snapshots, snapshots.read(number), place)
            except Damaged as error:
                _log.error("job %s: %s; the commit before is used", job, error)
                continue
            self._make_room(job)
            return number
        return self._copied(job, 0) if known else 0  # all that was known is gone

    def _copy(self, snapshots: Snapshots, snapshot: Snapshot, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        made = Path(mkdtemp(prefix="new-", dir=place.parent))
        try:
            for name, file in snapshot.files.items():
                if not name.startswith(_ROUNDS):
                    snapshots.fetch(name, file, made / name)
            made.chmod(0o755)
            with suppress(OSError):  # another process was faster
                made.rename(place)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _make_room(self, job: str) -> None:
        """Delete old copies: of this job all that nobody reads, and the oldest of others, until the rest is small enough."""
        copies = sorted(self._copies(), reverse=True)
        total, oldest = 0, time() - _IN_USE_SECONDS
        newest = max((path for _, path in copies if path.parent.name == job), key=lambda path: int(path.name))
        for used, path in copies:
            total += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            outdated = path.parent.name == job and path != newest
            if used < oldest and (outdated or total > self._most_bytes):
                shutil.rmtree(path, ignore_errors=True)

    def _copies(self) -> Iterator[tuple[float, Path]]:
        for path in self._root.glob("*/*"):
            if path.name.isdecimal():
                with suppress(OSError):
                    yield path.stat().st_mtime, path
