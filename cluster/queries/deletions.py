"""Deletes jobs in two steps. First a job is marked, and nobody sees it any more; when its files are gone, so is its row.

So a process that is killed in between leaves no files without a row that names them.
"""

from typing import Any, cast

from sqlalchemy import delete, select, update
from sqlalchemy.engine import CursorResult, Engine
from sqlalchemy.orm import Session

from chainfed_ray.cluster.tables import FINISHED, EventRow, JobRow, LabelRow, moment


class Deletions:
    """The jobs that are being deleted, in the database behind ``engine``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def mark(self, job: str) -> bool:
        """Hide a job that is over, and delete its events. False if there is none, or it is not over."""
        is_over = (JobRow.id == job, JobRow.status.in_(FINISHED), JobRow.deleted_at.is_(None))
        with Session(self._engine) as session, session.begin():
            # The key of its submission is free: the same request makes a new job.
            marked = session.execute(update(JobRow).where(*is_over).values(deleted_at=moment(), request_key=None))
            if cast("CursorResult[Any]", marked).rowcount == 0:
                return False
            session.execute(delete(EventRow).where(EventRow.job == job))
        return True

    def marked(self, limit: int) -> list[str]:
        """At most ``limit`` jobs that are marked, those first that were marked first."""
        query = select(JobRow.id).where(JobRow.deleted_at.is_not(None)).order_by(JobRow.deleted_at).limit(limit)
        with Session(self._engine) as session:
            return list(session.scalars(query))

    def purge(self, job: str) -> None:
        """Delete what is left of a job that is marked."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(EventRow).where(EventRow.job == job))  # of a process that had not heard of it yet
            session.execute(delete(LabelRow).where(LabelRow.job == job))
            session.execute(delete(JobRow).where(JobRow.id == job, JobRow.deleted_at.is_not(None)))
