"""How many bytes are kept for a tenant, of its uploads and of its jobs. It may have a limit (CHAINFED_STORED_BYTES).

The database keeps the sum of the jobs (``CountRow``), so it costs the same however many jobs there are.
"""

from sqlalchemy import func, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from chainfed_ray.cluster.storage import STORED_BYTES
from chainfed_ray.cluster.tables import CountRow, JobRow, UploadRow
from chainfed_ray.errors import LimitReached
from chainfed_ray.units import format_bytes

_FULL_SECONDS = 60  # until something may have been deleted


def check_kept(session: Session, tenant: str, most: int | None, more: int = 0) -> None:
    """Check that so many ``more`` bytes may be kept for ``tenant``, of ``most`` in all; without more, that there is room.

    An upload counts whether its bytes have come yet or not, and the same bytes are counted once. A job counts with what was
    kept of it when it was paused or over last, whatever it does since.

    Raises:
        LimitReached: they may not.
    """
    if most is None:
        return
    once = select(UploadRow.sha256, UploadRow.bytes).where(UploadRow.tenant == tenant).distinct().subquery()
    uploads = int(session.scalar(select(func.coalesce(func.sum(once.c.bytes), 0))) or 0)
    jobs = int(session.scalar(select(func.sum(CountRow.bytes)).where(CountRow.tenant == tenant)) or 0)
    if uploads + jobs + max(more, 1) > most:
        kept = f"{format_bytes(uploads)} of uploads and {format_bytes(jobs)} of jobs"
        what = f"{kept}, and {format_bytes(more)} more would be too many" if more else kept
        raise LimitReached(tenant, what, STORED_BYTES, _FULL_SECONDS)


class KeptBytes:
    """The bytes that are kept of jobs, in the database behind ``engine``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def note(self, job: str, count: int) -> None:
        """Put on record how many bytes are kept of a job. They count until others are noted, or the job is deleted."""
        with Session(self._engine) as session, session.begin():
            session.execute(update(JobRow).where(JobRow.id == job).values(kept_bytes=count))

    def check(self, tenant: str, most: int | None) -> None:
        """Check that there is room for what another job of ``tenant`` leaves. How much that is, nobody knows yet.

        Raises:
            LimitReached: ``most`` bytes are kept for it already.
        """
        with Session(self._engine) as session:
            check_kept(session, tenant, most)
