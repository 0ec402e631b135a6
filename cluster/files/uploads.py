"""The files that tenants have sent: a row of the database each, and their bytes, which a tenant keeps once.

An upload is what its tenant calls it and its SHA-256: who begins one that is there is given that one, and goes on with it.
Where its bytes are, ``upload_bytes`` says.

Any process may be killed at any time. Bytes that are complete while their row says otherwise are found by whoever asks next,
and bytes that no row names are deleted by ``remove_old``.
"""

from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any, Self

from sqlalchemy import ColumnElement, String, cast, delete, func, or_, select, true, update
from sqlalchemy.orm import Session

from chainfed_ray.cluster.files.kept_bytes import check_kept
from chainfed_ray.cluster.files.tenant_lock import TenantLocks
from chainfed_ray.cluster.files.upload_bytes import Arriving, upload_files
from chainfed_ray.cluster.files.upload_sources import uploads_in
from chainfed_ray.cluster.schema import open_tables
from chainfed_ray.cluster.storage import UPLOADS, Storage
from chainfed_ray.cluster.tables import JobRow, UploadRow, moment
from chainfed_ray.cluster.tenants import View
from chainfed_ray.errors import InvalidJob, LimitReached, ServiceBusy, UploadConflict, UploadNotFound
from chainfed_ray.reading import UploadedFile
from chainfed_ray.units import counted

KEPT_HOURS = 48  # a part of an upload, after its last byte came
_OVER = ("succeeded", "failed", "cancelled")  # jobs that read nothing any more
_LOCK_SECONDS = 5.0
_FULL_SECONDS = 60  # until something may have been deleted


@dataclass(frozen=True)
class Upload:
    """An upload, of which ``received`` bytes are here. Times are ISO 8601 in UTC."""

    id: str
    tenant: str
    name: str
    bytes: int
    sha256: str
    received: int
    complete: bool
    created_at: str


class UploadStore:
    """The uploads of a service; safe to use from several threads and processes. ``seen_by`` gives those that a tenant sees.

    Who changes a tenant's uploads waits at most ``lock_seconds`` for others that do.
    """

    def __init__(self, storage: Storage, lock_seconds: float = _LOCK_SECONDS) -> None:
        self._files, self._view = upload_files(storage), View()
        self._engine = open_tables(storage.database, existing=True)
        self._locks = TenantLocks(storage, self._engine, lock_seconds)

    def seen_by(self, tenant: str, everything: bool) -> Self:
        """These uploads as ``tenant`` sees them, who begins its own: those alone, unless it sees ``everything``."""
        part = copy(self)
        part._view = View(tenant, everything)
        return part

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def begin(
        self, name: str, size: int, sha256: str, most_stored: int | None = None, most_uploads: int | None = None
    ) -> Upload:
        """Begin an upload of ``size`` bytes, or give the one that the tenant has of this name and SHA-256.

        It is complete at once if the tenant has its bytes already. The tenant may have ``most_uploads``, and ``most_stored``
        bytes of them and of its jobs.

        Raises:
            InvalidJob: the tenant has an upload of this SHA-256 with another size.
            LimitReached: the tenant has as many uploads or bytes as it may.
            ServiceBusy: too many other requests change the tenant's uploads.
        """
        tenant = self._view.tenant
        with self._locks.held(tenant), Session(self._engine) as session, session.begin():
            same = select(UploadRow).where(UploadRow.tenant == tenant, UploadRow.sha256 == sha256)
            alike = list(session.scalars(same))
            if alike and alike[0].bytes != size:
                raise InvalidJob.at("bytes", size, f"{alike[0].bytes}, as in the upload {alike[0].id} of this SHA-256")
            for row in alike:
                if row.name == name:
                    return self._upload(row)
            count = session.scalar(select(func.count()).select_from(UploadRow).where(UploadRow.tenant == tenant)) or 0
            if most_uploads is not None and count >= most_uploads:
                raise LimitReached(tenant, counted(count, "upload", "uploads"), UPLOADS, _FULL_SECONDS)
            if not alike:
                check_kept(session, tenant, most_stored, size)
            row = UploadRow(
                id=token_hex(8),
                tenant=tenant,
                name=name,
                bytes=size,
                sha256=sha256,
                complete=self._files.has(tenant, sha256),
                created_at=moment(),
            )
            session.add(row)
            session.flush()
            return self._upload(row)

    def get(self, upload: str) -> Upload:
        """The upload with this id.

        Raises:
            UploadNotFound: there is none.
        """
        with Session(self._engine) as session:
            row = self._row(session, upload)
            found, known = self._upload(row), row.complete
        if found.complete and not known:  # who kept its bytes was killed before the database said so
            self._complete(found)
        return found

    def page(self, limit: int = 100, after: tuple[str, str] | None = None) -> list[Upload]:
        """At most ``limit`` uploads, the newest first; only those ``after`` one, by its time and id; it may be gone."""
        query = select(UploadRow).where(self._seen).order_by(UploadRow.number.desc()).limit(limit)
        if after is not None:
            created_at, upload = after
            number = select(UploadRow.number).where(self._seen, UploadRow.id == upload).scalar_subquery()
            earlier = number.is_(None) & (UploadRow.created_at < created_at)
            query = query.where(or_(UploadRow.number < number, earlier))
        with Session(self._engine) as session:
            return [self._upload(row) for row in session.scalars(query)]

    def receive(self, upload: str, offset: int) -> Arriving:
        """The file into which the bytes from ``offset`` on go. The caller closes it, and then calls ``finish``.

        Raises:
            UploadNotFound: there is no such upload.
            UploadConflict: these are not the next bytes, or another request sends them.
        """
        found = self.get(upload)
        if found.complete:
            raise UploadConflict(upload, "it is complete")
        file = self._files.arriving(found.tenant, upload, found.bytes)
        if file.received != offset:
            file.close()
            raise UploadConflict(
                upload, f"{file.received} bytes are here, so the next offset is {file.received}, not {offset}"
            )
        return file

    def finish(self, upload: str, file: Arriving) -> Upload:
        """Check the upload and keep its bytes, if all of them are in ``file``, which the caller holds.

        Raises:
            UploadNotFound: the upload was deleted meanwhile.
            UploadConflict: another request has changed the bytes meanwhile.
            InvalidJob: they have another SHA-256. They are deleted, and may be sent again.
        """
        file.flush()
        found = self.get(upload)
        if file.received < found.bytes or found.complete:
            return found
        if (digest := file.digest()) != found.sha256:
            if (now := self.get(upload)).complete:  # by another request that sent the same
                return now
            file.clear()
            raise InvalidJob.at(
                "sha256", found.sha256, f"{digest}, that of the {found.bytes} bytes that came; send them again"
            )
        self._keep(found)
        return self.get(upload)

    def delete(self, upload: str) -> None:
        """Delete an upload. Its bytes stay as long as the tenant has another upload of them.

        Raises:
            UploadNotFound: there is no such upload.
            UploadConflict: a job that is not over reads it.
            ServiceBusy: too many other requests change the tenant's uploads.
        """
        found = self.get(upload)
        with self._locks.held(found.tenant):
            with Session(self._engine) as session, session.begin():
                session.execute(delete(UploadRow).where(UploadRow.id == upload))
                if job := self._reader(session, found):  # see hold_uploads
                    raise UploadConflict(upload, f"job {job} reads it, and is not over")
            self._files.drop_partial(found.tenant, upload)
            self._drop(found.tenant, found.sha256)

    def files(self, tenant: str, document: dict[str, Any]) -> dict[str, UploadedFile]:
        """The files that a job of ``tenant`` with this document reads, by the ids of their uploads.

        An upload that the tenant does not have, or that is not complete, is missing.
        """
        wanted = uploads_in(document)
        if not wanted:
            return {}
        with Session(self._engine) as session:
            query = select(UploadRow.id).where(UploadRow.tenant == tenant, UploadRow.id.in_(wanted))
            own = list(session.scalars(query))
        found = [self.get(upload) for upload in own]
        return {one.id: UploadedFile(one.name, self._files.path(tenant, one.sha256)) for one in found if one.complete}

    def remove_old(self, hours: float = KEPT_HOURS) -> int:
        """Delete uploads of which a part came, and nothing for so many ``hours``; and bytes that no upload has.

        Returns how many uploads were deleted.
        """
        oldest, count = datetime.now(UTC) - timedelta(hours=hours), 0
        with Session(self._engine) as session:
            query = select(UploadRow).where(UploadRow.complete.is_(False), UploadRow.created_at < moment(oldest))
            halves = [self._upload(row) for row in session.scalars(query)]
        for half in halves:
            if half.complete or self._files.newest(half.tenant, half.id) > oldest.timestamp():
                continue
            try:
                with self._files.arriving(half.tenant, half.id, half.bytes):
                    self.delete(half.id)
                    count += 1
            except (UploadConflict, UploadNotFound, ServiceBusy):  # it goes on, or somebody else was faster
                continue
        for tenant in self._files.tenants():
            for upload in self._files.partials(tenant):  # the lock is held for one at a time: requests wait for it
                with suppress(ServiceBusy), self._locks.held(tenant):
                    self._drop_partial(tenant, upload)
            for sha256 in self._files.wholes(tenant):
                with suppress(ServiceBusy), self._locks.held(tenant):
                    self._drop(tenant, sha256)
        return count

    @property
    def _seen(self) -> ColumnElement[bool]:
        """The condition of a query that an upload is seen."""
        return true() if self._view.everything else UploadRow.tenant == self._view.tenant

    def _row(self, session: Session, upload: str) -> UploadRow:
        known = "\0" not in upload  # PostgreSQL raises an error of its own when it is asked for it
        row = session.scalar(select(UploadRow).where(self._seen, UploadRow.id == upload)) if known else None
        if row is None:
            raise UploadNotFound(upload)
        return row

    def _upload(self, row: UploadRow) -> Upload:
        """The upload as it is. Bytes that were checked make it complete, whoever sent them."""
        complete = row.complete or self._files.has(row.tenant, row.sha256)
        received = row.bytes if complete else self._files.received(row.tenant, row.id)
        return Upload(row.id, row.tenant, row.name, row.bytes, row.sha256, received, complete, row.created_at)

    def _keep(self, upload: Upload) -> None:
        """Keep bytes that were checked. No lock is held: with an object store it takes long, and nobody deletes bytes of a row.

        Raises: see ``finish``.
        """
        if self.get(upload.id).complete:  # another request that sent the same was faster
            return
        try:
            self._files.keep(upload.tenant, upload.id, upload.sha256)
        except (FileNotFoundError, UploadConflict):
            if self.get(upload.id).complete:
                return
            raise UploadConflict(upload.id, "another request sends to it now") from None
        try:
            self.get(upload.id)
        except UploadNotFound:  # deleted while its bytes were kept
            with suppress(ServiceBusy), self._locks.held(upload.tenant):  # or ``remove_old`` deletes them
                self._drop(upload.tenant, upload.sha256)
            raise
        self._complete(upload)

    def _complete(self, upload: Upload) -> None:
        same = (UploadRow.tenant == upload.tenant, UploadRow.sha256 == upload.sha256)
        # Were it deleted meanwhile, so were its bytes, and one that was begun since has none.
        still = select(UploadRow.id).where(UploadRow.id == upload.id).exists()
        with Session(self._engine) as session, session.begin():
            session.execute(update(UploadRow).where(*same, still).values(complete=True))

    def _reader(self, session: Session, upload: Upload) -> str | None:
        """A job that is not over and reads the upload."""
        jobs = select(JobRow.id, JobRow.spec).where(JobRow.tenant == upload.tenant, JobRow.status.not_in(_OVER))
        named = session.execute(jobs.where(cast(JobRow.spec, String).contains(upload.id)))
        return next((job for job, document in named if upload.id in uploads_in(document)), None)

    def _drop(self, tenant: str, sha256: str) -> None:
        """Delete bytes, unless an upload has them. The tenant's lock is held."""
        same = (UploadRow.tenant == tenant, UploadRow.sha256 == sha256)
        with Session(self._engine) as session:
            if session.scalar(select(UploadRow.id).where(*same).limit(1)) is None:
                self._files.drop(tenant, sha256)

    def _drop_partial(self, tenant: str, upload: str) -> None:
        """Delete what has arrived of an upload that is complete by other bytes, or was deleted."""
        of_row = (UploadRow.id == upload, UploadRow.complete.is_(False))
        with Session(self._engine) as session:
            if session.scalar(select(UploadRow.id).where(*of_row)) is None:
                self._files.drop_partial(tenant, upload)
