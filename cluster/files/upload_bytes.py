"""Where the bytes of uploads are: in a folder that all processes share, or in an object store. ::

uploads/<tenant>/<id>.partial      what has arrived of an upload: a file, or objects by the places of their bytes
uploads/<tenant>/<sha256>          the bytes of uploads that are complete; they were checked
uploads/<tenant>/lock              held while bytes are added to those, or taken away, where it is a folder
"""

import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from time import time
from typing import Protocol, Self

from chainfed_ray.cluster.files.arriving import ArrivingFile
from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.pieces import Pieces
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import UploadConflict

_PIECE_BYTES = 8 * 2**20
_UNUSED_SECONDS = 86400.0
LOCK = "lock"
_PARTIAL = ".partial"
_ELSEWHERE = "another request sends to it now"


class Arriving(Protocol):
    """The bytes of an upload as they arrive. A context manager: it holds them."""

    received: int

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def append(self, piece: bytes) -> None:
        """Keep the next bytes.

        Raises:
            UploadConflict: there are more than the upload has, or another request has sent some.
            OSError: what they are kept on is full or away.
        """
        ...

    def flush(self) -> None:
        """Let others see what was appended."""
        ...

    def digest(self) -> str:
        """The SHA-256 of what has arrived."""
        ...

    def clear(self) -> None:
        """Forget what has arrived."""
        ...

    def close(self) -> None:
        """Let go. What was appended stays."""
        ...


class UploadFiles(Protocol):
    """The bytes of uploads, by tenant and SHA-256, and those that arrive, by tenant and id."""

    def received(self, tenant: str, upload: str) -> int:
        """How many bytes of an upload have arrived."""
        ...

    def arriving(self, tenant: str, upload: str, size: int) -> Arriving:
        """The bytes of an upload, to append to. Raises ``UploadConflict`` if another request holds them."""
        ...

    def newest(self, tenant: str, upload: str) -> float:
        """When the last bytes of an upload came, in seconds since 1970; 0 if none came."""
        ...

    def keep(self, tenant: str, upload: str, digest: str) -> None:
        """Make the bytes that have arrived those of a complete upload. They were checked.

        Raises:
            UploadConflict: another request has changed them since.
            FileNotFoundError: another request has kept or deleted them.
        """
        ...

    def has(self, tenant: str, digest: str) -> bool:
        """Whether the bytes with this SHA-256 are there."""
        ...

    def path(self, tenant: str, digest: str) -> Path:
        """A file with these bytes, to read."""
        ...

    def drop(self, tenant: str, digest: str) -> None:
        """Delete bytes."""
        ...

    def drop_partial(self, tenant: str, upload: str) -> None:
        """Delete what has arrived of an upload."""
        ...

    def drop_unused(self) -> None:
        """Delete this machine's files of bytes that are elsewhere as well, if no job here has begun to read them for a day."""
        ...

    def tenants(self) -> list[str]:
        """Every tenant that has bytes here."""
        ...

    def wholes(self, tenant: str) -> list[str]:
        """The SHA-256 of all bytes of complete uploads."""
        ...

    def partials(self, tenant: str) -> list[str]:
        """The ids of the uploads of which bytes have arrived."""
        ...


def upload_files(storage: Storage) -> UploadFiles:
    """Where the bytes of uploads are in ``storage``."""
    return StoredUploads(storage.objects, storage) if storage.objects else UploadFolder(storage)


class UploadFolder:
    """See ``UploadFiles``: bytes in files."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def received(self, tenant: str, upload: str) -> int:
        """See ``UploadFiles``."""
        try:
            return self._partial(tenant, upload).stat().st_size
        except FileNotFoundError:
            return 0

    def arriving(self, tenant: str, upload: str, size: int) -> Arriving:
        """See ``UploadFiles``."""
        return ArrivingFile(upload, self._partial(tenant, upload), size)

    def newest(self, tenant: str, upload: str) -> float:
        """See ``UploadFiles``."""
        try:
            return self._partial(tenant, upload).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def keep(self, tenant: str, upload: str, digest: str) -> None:
        """See ``UploadFiles``."""
        content = self._whole(tenant, digest)
        self._partial(tenant, upload).replace(content)
        opened = os.open(content.parent, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)

    def has(self, tenant: str, digest: str) -> bool:
        """See ``UploadFiles``."""
        return self._whole(tenant, digest).exists()

    def path(self, tenant: str, digest: str) -> Path:
        """See ``UploadFiles``."""
        return self._whole(tenant, digest)

    def drop(self, tenant: str, digest: str) -> None:
        """See ``UploadFiles``."""
        self._whole(tenant, digest).unlink(missing_ok=True)

    def drop_partial(self, tenant: str, upload: str) -> None:
        """See ``UploadFiles``."""
        self._partial(tenant, upload).unlink(missing_ok=True)

    def drop_unused(self) -> None:
        """See ``UploadFiles``: these are the only ones."""

    def tenants(self) -> list[str]:
        """See ``UploadFiles``."""
        return [folder.name for folder in self._storage.uploads("x").parent.glob("*")]

    def wholes(self, tenant: str) -> list[str]:
        """See ``UploadFiles``."""
        names = (path.name for path in self._storage.uploads(tenant).iterdir())
        return [name for name in names if name != LOCK and not name.endswith(_PARTIAL)]

    def partials(self, tenant: str) -> list[str]:
        """See ``UploadFiles``."""
        return [path.stem for path in self._storage.uploads(tenant).glob(f"*{_PARTIAL}")]

    def _whole(self, tenant: str, digest: str) -> Path:
        return self._storage.uploads(tenant) / digest

    def _partial(self, tenant: str, upload: str) -> Path:
        return self._storage.uploads(tenant) / f"{upload}{_PARTIAL}"


class StoredUploads(UploadFolder):
    """See ``UploadFiles``: bytes in an object store. Files that are read are kept in the folder, and may be lost."""

    def __init__(self, objects: ObjectStore, storage: Storage) -> None:
        super().__init__(storage)
        self._objects = objects

    def received(self, tenant: str, upload: str) -> int:
        """See ``UploadFiles``."""
        return self._pieces(tenant, upload).received()

    def arriving(self, tenant: str, upload: str, size: int) -> Arriving:
        """See ``UploadFiles``. Nobody is held up here: of two who send the same bytes, one puts them."""
        return ArrivingPieces(upload, self._pieces(tenant, upload), size)

    def newest(self, tenant: str, upload: str) -> float:
        """See ``UploadFiles``."""
        return self._pieces(tenant, upload).newest()

    def keep(self, tenant: str, upload: str, digest: str) -> None:
        """See ``UploadFiles``."""
        pieces, whole = self._pieces(tenant, upload), self._whole(tenant, digest)
        partial = whole.with_name(f"{token_hex(8)}{_PARTIAL}")
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = sha256()
            with partial.open("wb") as file:
                for part in pieces.read():
                    found.update(part)
                    file.write(part)
            if found.hexdigest() != digest:
                raise UploadConflict(upload, _ELSEWHERE)
            self._objects.put(self._name(tenant, digest), partial)
            partial.replace(whole)  # a job that begins here need not ask for it
        finally:
            partial.unlink(missing_ok=True)
        pieces.clear()

    def has(self, tenant: str, digest: str) -> bool:
        """See ``UploadFiles``."""
        return self._objects.exists(self._name(tenant, digest))

    def path(self, tenant: str, digest: str) -> Path:
        """See ``UploadFiles``."""
        path = self._whole(tenant, digest)
        if path.exists():
            os.utime(path)  # it is of use
        else:
            self.drop_unused()
            if not self._objects.download_to(self._name(tenant, digest), path, digest):
                raise FileNotFoundError(f"the object of the upload {digest} has other bytes by now")
        return path

    def drop(self, tenant: str, digest: str) -> None:
        """See ``UploadFiles``."""
        self._objects.delete([self._name(tenant, digest)])
        super().drop(tenant, digest)

    def drop_partial(self, tenant: str, upload: str) -> None:
        """See ``UploadFiles``."""
        self._pieces(tenant, upload).clear()

    def tenants(self) -> list[str]:
        """See ``UploadFiles``."""
        return self._objects.folders("uploads")

    def wholes(self, tenant: str) -> list[str]:
        """See ``UploadFiles``."""
        return self._objects.files(f"uploads/{tenant}")

    def partials(self, tenant: str) -> list[str]:
        """See ``UploadFiles``."""
        return [name.removesuffix(_PARTIAL) for name in self._objects.folders(f"uploads/{tenant}")]

    def drop_unused(self) -> None:
        """See ``UploadFiles``. The store has their bytes, or they were deleted there."""
        oldest = time() - _UNUSED_SECONDS
        for path in self._storage.uploads("x").parent.glob("*/*"):
            with suppress(FileNotFoundError):  # another process was faster
                if path.name != LOCK and path.stat().st_mtime < oldest:
                    path.unlink()

    def _name(self, tenant: str, name: str) -> str:
        return f"uploads/{tenant}/{name}"

    def _pieces(self, tenant: str, upload: str) -> Pieces:
        return Pieces(self._objects, self._name(tenant, f"{upload}{_PARTIAL}"))


class ArrivingPieces:
    """See ``Arriving``: bytes as objects, of 8 MiB each where so many come at once."""

    def __init__(self, upload: str, pieces: Pieces, size: int) -> None:
        self._upload, self._pieces, self._size = upload, pieces, size
        self._waiting = bytearray()
        self.received = pieces.received()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, piece: bytes) -> None:
        """See ``Arriving``."""
        if self.received + len(piece) > self._size:
            raise UploadConflict(self._upload, f"it has {self._size} bytes, and more were sent")
        self._waiting += piece
        self.received += len(piece)
        if len(self._waiting) >= _PIECE_BYTES:
            self.flush()

    def digest(self) -> str:
        """See ``Arriving``."""
        self.flush()
        found = sha256()
        with suppress(FileNotFoundError):  # another request has kept them meanwhile, and deletes them
            for part in self._pieces.read():
                found.update(part)
        return found.hexdigest()

    def clear(self) -> None:
        """See ``Arriving``."""
        self._waiting.clear()
        self._pieces.clear()
        self.received = 0

    def close(self) -> None:
        """See ``Arriving``."""
        self.flush()

    def flush(self) -> None:
        """See ``Arriving``."""
        if self._waiting:
            waiting = bytes(self._waiting)
            self._waiting.clear()  # what is not taken is sent again by who has it
            try:
                self._pieces.put(self.received - len(waiting), waiting)
            except FileExistsError:
                raise UploadConflict(self._upload, _ELSEWHERE) from None
