"""The folder in which a coordinator works, while the job's commits are in an object store.

The store has the truth: a folder that says something else, or is lost, is made anew from it. What the coordinator commits in
the folder counts once it is in the store, and is told of only then.
"""

import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.snapshots import Damaged, Digests, Snapshot, Snapshots, StoredFile, files_below
from chainfed_ray.errors import CommitConflict, CorruptCommit
from chainfed_ray.problem import some_of
from chainfed_ray.records.secret import SECRET_BYTES, secret_path

_LOG = "log.jsonl"  # it grows between commits, and a line that is not in the store yet need not be lost
_ROUNDS = "rounds/"
_OWN = frozenset({"in-use", "privacy.key", "sites"})  # are not of a commit
_log = logging.getLogger(__name__)


class WorkingCopy:
    """The ``folder`` of a ``job``. One process works in it at a time; on other machines there may be other ones."""

    def __init__(self, objects: ObjectStore, job: str, folder: Path) -> None:
        self._snapshots, self._folder, self._job = Snapshots(objects, job), folder, job
        self._digests = Digests()
        self._newest = 0  # the number of the newest snapshot, whether it is whole or not
        self._base: Snapshot | None = None  # the snapshot that the folder began with, or that it has made
        self._fallback: Snapshot | None = None  # the newest one before it that has other rounds

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
            self._fallback = self._other_rounds(snapshot, numbers)
            self._restore_secret()
            return damaged
        if damaged:
            raise CorruptCommit(f"{self._snapshots.objects.shown}/{self._snapshots.prefix}", some_of(damaged, "; "))
        self._newest, self._base, self._fallback = 0, None, None
        self._remove_all_but(())
        self._restore_secret()
        return []

    def commit(self, is_last: bool = False) -> None:
        """Make the folder as it is the newest commit. After the ``is_last`` one, what no commit names is deleted.

        The commit before stays, and the newest one before it that has other rounds: a damaged object of a round is in those
        that have the same ones. The secret of noise is put first, also if nothing else is new.

        Raises:
            CommitConflict: another process has committed since this one began.
            OSError: the store or the disk is away. The same call may be made again.
        """
        self._put_secret()
        before = self._base
        files = {name: (path, self._digests.of(path)) for name, path in files_below(self._folder, _OWN)}
        snapshot = Snapshot(self._newest + 1, {name: file for name, (_, file) in files.items()})
        if before and snapshot.files == before.files:
            return
        there = before.digests if before else set()
        for path, file in files.values():
            if file.sha256 not in there:
                self._snapshots.put_content(path, file.sha256)
                there = there | {file.sha256}
        self._snapshots.create(snapshot)
        self._newest, self._base = snapshot.number, snapshot
        if before and _rounds(before) != _rounds(snapshot):
            self._fallback = before
        kept = [one for one in (snapshot, before, self._fallback) if one]
        try:
            keep = set[str]().union(*(one.digests for one in kept))
            numbers = {one.number for one in kept}
            found = self._snapshots.numbers()
            self._snapshots.delete([one for one in found if one < snapshot.number and one not in numbers], keep)
            if is_last:
                self._snapshots.delete_unnamed(keep)
        except OSError as error:  # what is left there does no harm
            _log.warning("old commits of job %s were not deleted: %s", self._job, error)

    def _other_rounds(self, snapshot: Snapshot, numbers: Sequence[int]) -> Snapshot | None:
        """The newest snapshot before ``snapshot`` that has other rounds: it has objects of its own to go on from."""
        for number in numbers:
            with suppress(Damaged, CorruptCommit):
                if number < snapshot.number and _rounds(found := self._snapshots.read(number)) != _rounds(snapshot):
                    return found
        return None

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
            return (path.name == _LOG and _goes_on_from(path, file)) or self._digests.of(path) == file
        except FileNotFoundError:
            return False

    def _remove_all_but(self, names: Collection[str]) -> None:
        for name, path in list(files_below(self._folder, _OWN)):
            if name != _LOG and name not in names:
                path.unlink()

    def _put_secret(self) -> None:
        """Put the secret of the job's noise, if it has been drawn.

        It takes the place of a torn one. Whoever was killed while it put that one has committed nothing with it, since a secret
        is put before rounds.

        Raises:
            CommitConflict: another process has drawn one.
        """
        path, objects, name = secret_path(self._folder), self._snapshots.objects, self._snapshots.secret
        if path.exists():
            secret = path.read_bytes()
            try:
                objects.create(name, secret)
            except FileExistsError:
                if len(objects.get(name)) == SECRET_BYTES:
                    raise CommitConflict(self._snapshots.prefix, self._newest + 1) from None
                objects.put(name, secret)

    def _restore_secret(self) -> None:
        """Make the secret that of the store, if it has a whole one. One drawn here and not put yet stays: it may be in use."""
        try:
            secret = self._snapshots.objects.get(self._snapshots.secret)
        except FileNotFoundError:
            return
        if len(secret) != SECRET_BYTES:
            _log.warning("job %s: the secret in the store is torn, and is put anew with the next commit", self._job)
            return
        path = secret_path(self._folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(secret)


def _goes_on_from(log: Path, committed: StoredFile) -> bool:
    """Whether a log has more lines than were committed, and those. After a restore it may be one of what is no more."""
    if log.stat().st_size <= committed.bytes:
        return False
    with log.open("rb") as lines:
        return sha256(lines.read(committed.bytes)).hexdigest() == committed.sha256


def _rounds(snapshot: Snapshot) -> dict[str, StoredFile]:
    """The files of a snapshot's rounds."""
    return {name: file for name, file in snapshot.files.items() if name.startswith(_ROUNDS)}
