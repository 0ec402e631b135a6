"""The folder in which a coordinator works, while the job's commits are in an object store.

The store has the truth: a folder that says something else, or is lost, is made anew from it. What the coordinator commits in
the folder counts once it is in the store, and is told of only then.
"""

import logging
from collections.abc import Collection
from pathlib import Path

from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.snapshots import Damaged, Digests, Snapshot, Snapshots, StoredFile, files_below
from chainfed_ray.errors import CommitConflict, CorruptCommit
from chainfed_ray.records.secret import secret_path

_LOG = "log.jsonl"  # it grows between commits, and a line that is not in the store yet need not be lost
_OWN = frozenset({"in-use", "privacy.key", "sites"})  # are not of a commit
_log = logging.getLogger(__name__)


class WorkingCopy:
    """The ``folder`` of a ``job``. One process works in it at a time; on other machines there may be other ones."""

    def __init__(self, objects: ObjectStore, job: str, folder: Path) -> None:
        self._snapshots, self._folder, self._job = Snapshots(objects, job), folder, job
        self._digests = Digests()
        self._newest = 0  # the number of the newest snapshot, whether it is whole or not
        self._base: Snapshot | None = None  # the snapshot that the folder began with, or that it has made

    def begin(self) -> list[str]:
        """Make the folder what was committed last. Returns what of it is damaged, if the commit before is used.

        Raises:
            CorruptCommit: no commit can be used.
            OSError: the store or the disk is away.
        """
        damaged = list[str]()
        numbers = self._snapshots.numbers()
        for number in numbers:
            try:
                snapshot = self._snapshots.read(number)
                self._restore(snapshot)
            except Damaged as error:
                damaged.append(str(error))
                continue
            self._newest, self._base = numbers[0], snapshot
            self._restore_secret()
            return damaged
        if damaged:
            raise CorruptCommit(f"{self._snapshots.objects.url}/{self._snapshots.prefix}", "; ".join(damaged))
        self._remove_all_but(())
        return []

    def commit(self, is_last: bool = False) -> None:
        """Make the folder as it is the newest commit. After the ``is_last`` one, what no commit names is deleted.

        Raises:
            CommitConflict: another process has committed since this one began.
            OSError: the store or the disk is away. The same call may be made again.
        """
        before = self._base
        files = {name: (path, self._digests.of(path)) for name, path in files_below(self._folder, _OWN)}
        snapshot = Snapshot(self._newest + 1, {name: file for name, (_, file) in files.items()})
        if before and snapshot.files == before.files:
            return
        self._put_secret()
        there = before.digests if before else set()
        for path, file in files.values():
            if file.sha256 not in there:
                self._snapshots.put_content(path, file.sha256)
                there = there | {file.sha256}
        self._snapshots.create(snapshot)
        self._newest, self._base = snapshot.number, snapshot
        try:
            keep = snapshot.digests | (before.digests if before else set())
            kept = {snapshot.number, before.number if before else 0}
            old = [number for number in self._snapshots.numbers() if number < snapshot.number and number not in kept]
            self._snapshots.delete(old, keep)
            if is_last:
                self._snapshots.delete_unnamed(keep)
        except OSError as error:  # what is left there does no harm
            _log.warning("old commits of job %s were not deleted: %s", self._job, error)

    def _restore(self, snapshot: Snapshot) -> None:
        """Make the folder that of a snapshot.

        Raises:
            Damaged: an object is gone, or has other bytes.
        """
        for name, file in snapshot.files.items():
            path = self._folder / name
            if not self._has(path, file):
                self._snapshots.fetch(name, file, path)
        self._remove_all_but(snapshot.files.keys())

    def _has(self, path: Path, file: StoredFile) -> bool:
        try:
            return (path.name == _LOG and path.stat().st_size > file.bytes) or self._digests.of(path) == file
        except FileNotFoundError:
            return False

    def _remove_all_but(self, names: Collection[str]) -> None:
        for name, path in list(files_below(self._folder, _OWN)):
            if name != _LOG and name not in names:
                path.unlink()

    def _put_secret(self) -> None:
        """Put the secret of the job's noise, if it has been drawn.

        Raises:
            CommitConflict: another process has drawn one.
        """
        path = secret_path(self._folder)
        if path.exists():
            try:
                self._snapshots.objects.create(self._snapshots.secret, path.read_bytes())
            except FileExistsError:
                raise CommitConflict(self._snapshots.prefix, self._newest + 1) from None

    def _restore_secret(self) -> None:
        path = secret_path(self._folder)
        path.unlink(missing_ok=True)
        try:
            secret = self._snapshots.objects.get(self._snapshots.secret)
        except FileNotFoundError:
            return
        path.touch(mode=0o600)
        path.write_bytes(secret)
