"""The tensors of orders and answers, and documents of jobs.

They are in files beside a job's commits, or in an object store where machines share no folder. ::

jobs/<job>/sites/documents/<sha256>.json           what all orders of the job have in common
jobs/<job>/sites/tensors/<sha256>.safetensors      what orders bring
jobs/<job>/sites/answers/<order>.safetensors       what answers bring
jobs/<job>/sites/answers/<order>.partial           what has arrived of it: a file, or objects by the places of their bytes
"""

import shutil
from contextlib import suppress
from fcntl import LOCK_EX, flock
from pathlib import Path
from secrets import token_hex

from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.pieces import Pieces
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.wire.envelope import HashedFile, JobDocument


def site_files(storage: Storage) -> "SiteFiles":
    """Where the tensors of orders and answers are in ``storage``."""
    return StoredSiteFiles(storage.objects, storage) if storage.objects else SiteFiles(storage)


class SiteFiles:
    """Tensors in files that all processes share."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def keep_document(self, job: str, document: JobDocument) -> HashedFile:
        """Keep the document of a job, for its sites. Gives the description of its file."""
        described = document.described()
        file = self.local_document(job, described.sha256)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{token_hex(4)}.partial")
        partial.write_bytes(document.content())
        partial.replace(file)
        return described

    def document(self, job: str, digest: str) -> Path:
        """The file of a document of a job. It is not there if nobody keeps it."""
        return self.local_document(job, digest)

    def keep_tensors(self, job: str, file: Path, digest: str) -> None:
        """Make ``file``, which is in the same folder or on the same disk, the tensors of orders."""
        self.local_tensors(job, digest).parent.mkdir(parents=True, exist_ok=True)
        file.replace(self.local_tensors(job, digest))

    def tensors(self, job: str, digest: str) -> Path:
        """The file of the tensors of orders. It is not there if nobody keeps them."""
        return self.local_tensors(job, digest)

    def drop_tensors(self, job: str, digest: str) -> None:
        """Delete the tensors of orders."""
        self.local_tensors(job, digest).unlink(missing_ok=True)

    def received(self, job: str, order: str) -> int:
        """How many bytes of an answer's tensors have arrived."""
        file = self._partial(job, order)
        return file.stat().st_size if file.exists() else 0

    def receive(self, job: str, order: str, offset: int, piece: bytes) -> int:
        """Keep a piece of an answer's tensors, if it is the next one. Gives how many bytes have arrived."""
        file = self._partial(job, order)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as opened:
            flock(opened, LOCK_EX)  # a piece that is sent again may come while the first is written
            if opened.tell() == offset:
                opened.write(piece)
                opened.flush()
            return opened.tell()

    def drop_received(self, job: str, order: str) -> None:
        """Delete what has arrived of an answer's tensors."""
        self._partial(job, order).unlink(missing_ok=True)

    def keep_answer(self, job: str, order: str, described: HashedFile) -> bool:
        """Keep what has arrived as the tensors of an answer. False if it is not what is ``described``: then it is deleted."""
        file = self._partial(job, order)
        found = HashedFile.of(file) if file.exists() else None
        if found != described:
            file.unlink(missing_ok=True)
            return False
        file.replace(self.local_answer(job, order))
        return True

    def answer(self, job: str, order: str) -> Path:
        """The file of the tensors of an answer."""
        return self.local_answer(job, order)

    def drop_answer(self, job: str, order: str) -> None:
        """Delete the tensors of an answer."""
        self.local_answer(job, order).unlink(missing_ok=True)

    def forget(self, job: str) -> None:
        """Delete every file of a job."""
        shutil.rmtree(self._folder(job), ignore_errors=True)

    def local_document(self, job: str, digest: str) -> Path:
        """Where the file of a document of a job is on this machine."""
        return self._folder(job) / "documents" / f"{digest}.json"

    def local_tensors(self, job: str, digest: str) -> Path:
        """Where a file of tensors of orders is on this machine."""
        return self._folder(job) / "tensors" / f"{digest}.safetensors"

    def local_answer(self, job: str, order: str) -> Path:
        """Where a file of an answer is on this machine. A job gives no two sites the same order: each names its client."""
        return self._folder(job) / "answers" / f"{order}.safetensors"

    def _partial(self, job: str, order: str) -> Path:
        return self.local_answer(job, order).with_suffix(".partial")

    def _folder(self, job: str) -> Path:
        return self._storage.job(job) / "sites"


class StoredSiteFiles(SiteFiles):
    """Tensors as objects. Files of them on this machine may be lost. See ``SiteFiles``."""

    def __init__(self, objects: ObjectStore, storage: Storage) -> None:
        super().__init__(storage)
        self._objects = objects

    def keep_document(self, job: str, document: JobDocument) -> HashedFile:
        """See ``SiteFiles``."""
        described = super().keep_document(job, document)
        self._objects.put(self._document(job, described.sha256), self.local_document(job, described.sha256))
        return described

    def document(self, job: str, digest: str) -> Path:
        """See ``SiteFiles``."""
        file = self.local_document(job, digest)
        if not file.exists():
            self._fetch(self._document(job, digest), file, digest)
        return file

    def keep_tensors(self, job: str, file: Path, digest: str) -> None:
        """See ``SiteFiles``."""
        self._objects.put(self._tensors(job, digest), file)
        super().keep_tensors(job, file, digest)

    def tensors(self, job: str, digest: str) -> Path:
        """See ``SiteFiles``."""
        file = self.local_tensors(job, digest)
        if not file.exists():
            self._fetch(self._tensors(job, digest), file, digest)
            for other in file.parent.glob(
                f"{64 * '?'}{file.suffix}"
            ):  # of rounds before, where their orders were served
                if other != file:
                    other.unlink(missing_ok=True)
        return file

    def drop_tensors(self, job: str, digest: str) -> None:
        """See ``SiteFiles``."""
        self._objects.delete([self._tensors(job, digest)])
        super().drop_tensors(job, digest)

    def received(self, job: str, order: str) -> int:
        """See ``SiteFiles``."""
        return self._pieces(job, order).received()

    def receive(self, job: str, order: str, offset: int, piece: bytes) -> int:
        """See ``SiteFiles``. A piece is put once, whichever process it comes to."""
        pieces = self._pieces(job, order)
        there = pieces.received()
        if there != offset or not piece:
            return there
        try:
            pieces.put(offset, piece)
        except FileExistsError:
            return pieces.received()
        return offset + len(piece)

    def drop_received(self, job: str, order: str) -> None:
        """See ``SiteFiles``."""
        self._pieces(job, order).clear()

    def keep_answer(self, job: str, order: str, described: HashedFile) -> bool:
        """See ``SiteFiles``."""
        pieces, name = self._pieces(job, order), self._answer(job, order)
        own = self.local_answer(job, order).with_suffix(
            f".{token_hex(4)}.partial"
        )  # the same answer may come twice at once
        own.parent.mkdir(parents=True, exist_ok=True)
        try:
            with own.open("wb") as file, suppress(FileNotFoundError):  # the other one was faster, and deletes them
                file.writelines(pieces.read())
            fits = HashedFile.of(own) == described
            if fits:
                self._objects.put(name, own)
            else:
                with suppress(FileNotFoundError):
                    fits = self._objects.download_to(name, own, described.sha256)  # the other one has kept it
        finally:
            own.unlink(missing_ok=True)
        pieces.clear()
        return fits

    def answer(self, job: str, order: str) -> Path:
        """See ``SiteFiles``."""
        file = self.local_answer(job, order)
        self._fetch(self._answer(job, order), file)
        return file

    def drop_answer(self, job: str, order: str) -> None:
        """See ``SiteFiles``."""
        self._objects.delete([self._answer(job, order)])
        super().drop_answer(job, order)

    def forget(self, job: str) -> None:
        """See ``SiteFiles``."""
        self._objects.delete_below(f"jobs/{job}/sites")
        super().forget(job)

    def _fetch(self, name: str, file: Path, digest: str | None = None) -> None:
        """Write an object to ``file``, if there is one; with a ``digest``, one of this SHA-256."""
        with suppress(FileNotFoundError):
            self._objects.download_to(name, file, digest)

    def _document(self, job: str, digest: str) -> str:
        return f"jobs/{job}/sites/documents/{digest}"

    def _tensors(self, job: str, digest: str) -> str:
        return f"jobs/{job}/sites/tensors/{digest}"

    def _answer(self, job: str, order: str) -> str:
        return f"jobs/{job}/sites/answers/{order}"

    def _pieces(self, job: str, order: str) -> Pieces:
        return Pieces(self._objects, f"{self._answer(job, order)}.partial")
