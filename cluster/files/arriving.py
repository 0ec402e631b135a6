"""The bytes of an upload as they arrive: appended by one writer at a time, on the disk before they are told of.

What a process that is killed has written stays. The next one goes on behind it.
"""

import os
from fcntl import LOCK_EX, LOCK_NB, flock
from hashlib import sha256
from pathlib import Path
from typing import Self

from chainfed_ray.errors import UploadConflict

_SYNCED_BYTES = 16 * 2**20  # are written before the disk is waited for
_READ_BYTES = 2**20


class ArrivingFile:
    """The file ``path`` of the ``upload``, which has ``size`` bytes when it is whole. A context manager: it holds the file.

    Raises:
        UploadConflict: another writer holds the file.
    """

    def __init__(self, upload: str, path: Path, size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._upload, self._path, self._size, self._unsynced = upload, path, size, 0
        self._file = path.open("ab", buffering=0)
        try:
            flock(self._file, LOCK_EX | LOCK_NB)
            os.fsync(self._file.fileno())  # what a killed process has written
        except BlockingIOError:
            self._file.close()
            raise UploadConflict(upload, "another request sends to it now") from None
        except BaseException:
            self._file.close()
            raise
        self.received = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, piece: bytes) -> None:
        """Write the next bytes.

        Raises:
            UploadConflict: there are more than the upload has; none of ``piece`` is written.
            OSError: the disk is full or gone.
        """
        if self.received + len(piece) > self._size:
            raise UploadConflict(self._upload, f"it has {self._size} bytes, and more were sent")
        rest = memoryview(piece)
        while rest:
            count = self._file.write(rest)
            rest = rest[count:]
            self.received += count
            self._unsynced += count
        if self._unsynced >= _SYNCED_BYTES:
            self._sync()

    def flush(self) -> None:
        """Do nothing: what was appended is in the file."""

    def digest(self) -> str:
        """The SHA-256 of what has arrived."""
        found = sha256()
        with self._path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                found.update(block)
        return found.hexdigest()

    def clear(self) -> None:
        """Forget what has arrived."""
        self._file.truncate(0)
        self.received = 0

    def close(self) -> None:
        """Let go of the file. Its bytes are on the disk."""
        try:
            self._sync()
        finally:
            self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._unsynced = 0
