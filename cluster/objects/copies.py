"""Copies of what jobs have committed to an object store, for processes that only read: the API, and those with models.

A copy is a folder of its own for each commit, so who reads in one is not disturbed by the next. The commits' tensors, which
only coordinators read, are left out. A file that is in the copy before as well is a link to that one. All copies of a machine
share a number of bytes: the oldest make room. A copy is known by its commit's number and hash: after a restore, another commit
has the same number. ::

    copies/<job>/<number>-<hash>/… a copy, which is made as a whole, and goes as a whole
    copies/<job>/new-…             what is being copied
    copies/<job>/gone-…            what is being deleted
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from stat import S_ISREG
from tempfile import mkdtemp
from time import monotonic, time

from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.snapshots import Damaged, Snapshot, Snapshots

_LOOK_SECONDS = 1.0  # until the store is asked again for a newer commit of the same job
_MOST_BYTES = 2 * 2**30  # of copies on a machine
_IN_USE_SECONDS = 600.0  # since a copy was asked for: somebody may still read it
_OUTDATED_SECONDS = 120.0  # the same of a copy that is not the newest of its job: who reads in it has opened its files
_ABANDONED_SECONDS = 3600.0  # since what is being copied, or deleted, was begun: its process was killed
_KNOWN_JOBS = 10_000
_NONE = "0"  # the folder of a job without commits, which is not there
_ROUNDS, _LAST = "rounds/", "finished.json"
_log = logging.getLogger(__name__)


class Copies:
    """The copies below ``root``. Safe to use from several threads and processes."""

    def __init__(self, objects: ObjectStore, root: Path, most_bytes: int = _MOST_BYTES) -> None:
        self._objects, self._root, self._most_bytes = objects, root, most_bytes
        # When the store was asked for a job's newest commit, and the name of its copy.
        self._looked: dict[str, tuple[float, str]] = {}
        self._made: dict[str, Snapshot] = {}  # of each job, what the newest copy that was made here has

    def folder(self, job: str, at_once: bool = False) -> Path:
        """The folder of what a job has committed, a second ago at most; with ``at_once``, now. It is not there without commits.

        Raises:
            OSError: the store is away, or the disk.
        """
        when, name = self._looked.get(job, (float("-inf"), _NONE))
        place = self._root / job / name
        is_last = (place / _LAST).exists()  # nothing comes after it
        if (is_last or (not at_once and monotonic() - when < _LOOK_SECONDS)) and _take(place):
            return place
        found = self._copied(job, name)
        self._looked[job] = monotonic(), found
        if len(self._looked) > _KNOWN_JOBS:
            self._looked.clear()
            self._made.clear()
        return self._root / job / found

    def _copied(self, job: str, known: str) -> str:
        """The name of the copy that there is now of the newest whole commit; ``_NONE`` if there is no commit."""
        snapshots, after = Snapshots(self._objects, job), _number(known)
        numbers = [*snapshots.numbers(after=after), *([after] if after else [])]
        for number in numbers:
            if number == after and _take(self._root / job / known):
                return known
            try:
                snapshot = snapshots.read(number)
                place = self._root / job / _name(snapshot)
                if _take(place):
                    return place.name
                self._copy(snapshots, snapshot, place)
            except Damaged as error:
                if snapshots.numbers(after=numbers[0]):  # newer commits came meanwhile, and this one was deleted
                    return self._copied(job, f"{numbers[0]}-")
                _log.error("job %s: %s; the commit before is used", job, error)
                continue
            self._make_room(place)
            return place.name
        return self._copied(job, _NONE) if after else _NONE  # all that was known is gone

    def _copy(self, snapshots: Snapshots, snapshot: Snapshot, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        before = self._made.get(place.parent.name)
        made = Path(mkdtemp(prefix="new-", dir=place.parent))
        try:
            for name, file in snapshot.files.items():
                if name.startswith(_ROUNDS):
                    continue
                old = place.with_name(_name(before)) / name if before and before.files.get(name) == file else None
                if old is None or not _is_linked(old, made / name):
                    snapshots.fetch(name, file, made / name)
            made.chmod(0o755)
            with suppress(OSError):  # another process was faster
                made.rename(place)
            self._made[place.parent.name] = snapshot
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _make_room(self, made: Path) -> None:
        """Delete old copies, now that one was ``made``.

        Of the same job, all others go. Of other jobs, the oldest go until the copies have no more than the most bytes. A copy
        that somebody may still read stays in any case.
        """
        copies = sorted(self._copies(), reverse=True)
        total, now, counted = 0, time(), set[tuple[int, int]]()
        for _, path in copies:
            with suppress(FileNotFoundError):  # another process deletes the copy
                for file in path.rglob("*"):
                    stat = file.stat()
                    if S_ISREG(stat.st_mode) and (stat.st_dev, stat.st_ino) not in counted:
                        counted.add((stat.st_dev, stat.st_ino))
                        total += stat.st_size
            if path.parent == made.parent and path != made:
                _delete(path, now - _OUTDATED_SECONDS)
            elif total > self._most_bytes:
                _delete(path, now - _IN_USE_SECONDS)
        for pattern in ("*/new-*", "*/gone-*"):
            for path in self._root.glob(pattern):
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < now - _ABANDONED_SECONDS:
                        shutil.rmtree(path, ignore_errors=True)

    def _copies(self) -> Iterator[tuple[float, Path]]:
        for path in self._root.glob("*/*"):
            if _number(path.name):
                with suppress(OSError):
                    yield path.stat().st_mtime, path


def _name(snapshot: Snapshot) -> str:
    return f"{snapshot.number}-{snapshot.digest[:16]}"


def _number(name: str) -> int:
    """The number of the commit of which a folder is a copy; 0 if it is none."""
    number = name.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def _take(place: Path) -> bool:
    """Whether a copy is there. Its time is from now on that of this call, so others know that it is in use."""
    try:
        os.utime(place)
    except OSError:
        return place.exists()
    return True


def _is_linked(old: Path, new: Path) -> bool:
    """Make ``new`` the same file as ``old``. False if ``old`` is gone, or its file system has no such links."""
    new.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        new.hardlink_to(old)
        return True
    return False


def _delete(copy: Path, oldest: float) -> None:
    """Delete a copy that nobody has asked for since ``oldest``. It goes from its place at once: a half is never found there."""
    gone = copy.with_name(f"gone-{copy.name}-{token_hex(4)}")
    with suppress(OSError):  # another process was faster
        if copy.stat().st_mtime < oldest:
            copy.rename(gone)
            os.utime(gone)
            shutil.rmtree(gone, ignore_errors=True)
