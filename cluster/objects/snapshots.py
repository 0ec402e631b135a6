"""The folder of a job as numbered snapshots in an object store: each is a list of files, whose bytes are objects of their own.

The objects of new bytes come first, and then the list, on the condition that nobody has put this number. So of two coordinators
of a job only one commits, and a list that is there names objects that are there. A snapshot is damaged if an object that it
names is missing, or has another SHA-256; then the one before is used, whose objects are kept as well. ::

    jobs/<job>/snapshots/00000007      the SHA-256 of what follows it: the names of files, with their bytes and SHA-256
    jobs/<job>/content/<sha256>        the bytes of files
    jobs/<job>/privacy.key             the secret of a job with noise, until the job ends
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from secrets import token_hex

from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.errors import CommitConflict, CorruptCommit

_VERSION = 1
_READ_BYTES = 2**20
_log = logging.getLogger(__name__)


class Damaged(Exception):
    """A snapshot, or an object that it names, is not what was put. The message says which, and how."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a snapshot."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """The files of a job by their names in its folder, as they were at a commit."""

    number: int
    files: Mapping[str, StoredFile]
    digest: str = ""  # the SHA-256 of its list, once that is put: no other commit has it, also after a restore

    @property
    def digests(self) -> set[str]:
        """The SHA-256 of every file."""
        return {file.sha256 for file in self.files.values()}


class Snapshots:
    """The snapshots of one job."""

    def __init__(self, objects: ObjectStore, job: str) -> None:
        self.objects, self.prefix = objects, f"jobs/{job}"
        self._writer = token_hex(8)  # makes each list its writer's own, whatever another process commits

    def numbers(self, after: int = 0) -> list[int]:
        """The numbers of all snapshots behind ``after``, the newest first. What is no snapshot is passed over."""
        found = self.objects.below(f"{self.prefix}/snapshots", self._list(after) if after else None)
        names = (one.name.rpartition("/")[2] for one in found)
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def read(self, number: int) -> Snapshot:
        """The snapshot with this number.

        Raises:
            Damaged: it is gone, or not what was put.
        """
        try:
            digest, _, body = self.objects.get(self._list(number)).partition(b"\n")
        except FileNotFoundError:
            raise Damaged(f"commit {number} is missing") from None
        if digest.decode("ascii", "replace") != sha256(body).hexdigest():
            raise Damaged(f"commit {number} is not what was written")
        document = json.loads(body)
        if document["version"] != _VERSION:
            reason = f"it has version {document['version']}; this chainfed-ray reads version {_VERSION}"
            raise CorruptCommit(f"{self.objects.shown}/{self._list(number)}", reason)
        files = {name: StoredFile(size, digest) for name, (size, digest) in document["files"].items()}
        return Snapshot(number, files, sha256(body).hexdigest())

    def create(self, snapshot: Snapshot) -> None:
        """Put a snapshot, whose objects are there.

        Raises:
            CommitConflict: another process has committed since this one began.
        """
        files = {name: (file.bytes, file.sha256) for name, file in sorted(snapshot.files.items())}
        document = {"version": _VERSION, "writer": self._writer, "files": files}
        body = json.dumps(document, separators=(",", ":")).encode()
        name = self._list(snapshot.number)
        try:
            self.objects.create(name, sha256(body).hexdigest().encode() + b"\n" + body)
        except FileExistsError:
            raise CommitConflict(self.prefix, snapshot.number) from None
        if self.numbers(after=snapshot.number):  # this number was used before, and deleted since
            self.objects.delete([name])
            raise CommitConflict(self.prefix, snapshot.number)

    def put_content(self, path: Path, digest: str) -> None:
        """Put the bytes of a file."""
        self.objects.put(self._content(digest), path)

    def fetch(self, name: str, file: StoredFile, path: Path) -> None:
        """Write a file of a snapshot to ``path``, as a whole or not at all.

        Raises:
            Damaged: its object is gone, or has other bytes.
        """
        try:
            is_whole = self.objects.download_to(self._content(file.sha256), path, file.sha256, file.bytes)
        except FileNotFoundError:
            raise Damaged(f"the object of {name} is missing") from None
        if not is_whole:
            raise Damaged(f"the object of {name} is not what was written")

    def delete(self, numbers: list[int], keep: set[str]) -> None:
        """Delete snapshots, with the objects that only they name: those of ``keep`` stay."""
        for number in numbers:
            with suppress(Damaged):
                self.objects.delete(map(self._content, self.read(number).digests - keep))
            self.objects.delete([self._list(number)])

    def delete_unnamed(self, keep: set[str]) -> None:
        """Delete every object with bytes but those of ``keep``: what processes that were killed have put and never named."""
        found = self.objects.below(f"{self.prefix}/content")
        self.objects.delete(one.name for one in found if one.name.rpartition("/")[2] not in keep)

    @property
    def secret(self) -> str:
        """The name of the object with the secret of the job's noise."""
        return f"{self.prefix}/privacy.key"

    def _list(self, number: int) -> str:
        return f"{self.prefix}/snapshots/{number:08d}"

    def _content(self, digest: str) -> str:
        return f"{self.prefix}/content/{digest}"


class Digests:
    """The SHA-256 of files, each computed once as long as the file stays as it is."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int, int], StoredFile]] = {}

    def of(self, path: Path) -> StoredFile:
        """The size and SHA-256 of a file.

        Raises:
            FileNotFoundError: it is not there.
        """
        state = os.stat(path)
        now = (state.st_ino, state.st_size, state.st_mtime_ns)
        known = self._known.get(path)
        if known is None or known[0] != now:
            found, size = sha256(), 0
            with path.open("rb") as file:
                while block := file.read(_READ_BYTES):
                    found.update(block)
                    size += len(block)
            known = self._known[path] = now, StoredFile(size, found.hexdigest())
        return known[1]


def files_below(folder: Path, but: frozenset[str]) -> Iterator[tuple[str, Path]]:
    """The files in ``folder`` and in folders below it, with their names from there, but the files and folders ``but``."""
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if not _is_passing(name) and str(inside / name) not in but]
        for name in names:
            if not _is_passing(name) and str(inside / name) not in but:
                yield (inside / name).as_posix(), Path(place) / name


def _is_passing(name: str) -> bool:
    """Whether this is the name of what is being written, or being replaced."""
    return name.endswith((".partial", ".before"))
