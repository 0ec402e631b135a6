"""Deletes jobs in two steps. First a job is marked, and nobody sees it any more; when its files are gone, so is its row.

So a process that is killed in between leaves no files without a row that names them.
"""

from collections.abc import Collection, Mapping
from typing import Any, cast

from sqlalchemy import delete, select, update
from sqlalchemy.engine import CursorResult, Engine
from sqlalchemy.orm import Session

from chainfed_ray.cluster.queries.aliases import Shares, aliases_of
from chainfed_ray.cluster.queries.events import check_revision
from chainfed_ray.cluster.queries.served_names import rows_on_base
from chainfed_ray.cluster.tables import EventRow, JobRow, LabelRow, moment
from chainfed_ray.cluster.tenants import View
from chainfed_ray.records.states import FINISHED


class AliasesChanged(Exception):
    """A tenant has other aliases than those that were looked at, or one would stand for nothing: look again."""


class Deletions:
    """The jobs that are being deleted, in the database behind ``engine``. See ``check_revision`` for ``revisions``."""

    def __init__(self, engine: Engine, revisions: Collection[str] | None = None) -> None:
        self._engine, self._revisions = engine, revisions

    def mark(self, job: str, seen: tuple[str, Mapping[str, Shares]]) -> bool:
        """Hide a job that is over, and delete its events. False if there is none, or it is not over.

        ``seen`` are the job's tenant and its aliases, none of which stands for the job's model.

        Raises:
            AliasesChanged: one may stand for it by now.
            PreconditionFailed: the job has another revision.
        """
        is_over = (JobRow.id == job, JobRow.status.in_(FINISHED), JobRow.deleted_at.is_(None))
        with Session(self._engine) as session, session.begin():
            # Aliases are locked before jobs, as by who sets one: so neither waits for the other in a circle.
            aliases_of(session, View(seen[0], everything=False), locked=True)
            # The key of its submission is free: the same request makes a new job.
            marked = session.execute(update(JobRow).where(*is_over).values(deleted_at=moment(), request_key=None))
            if cast("CursorResult[Any]", marked).rowcount == 0:
                return False
            check_revision(session, job, self._revisions)
            # Who makes a new alias locks the jobs for which it stands: it is here by now, or finds this job deleted.
            _check_aliases(session, job, *seen)
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
            session.execute(delete(EventRow).where(EventRow.job == job))  # of a process of an earlier version
            session.execute(delete(LabelRow).where(LabelRow.job == job))
            session.execute(delete(JobRow).where(JobRow.id == job, JobRow.deleted_at.is_not(None)))


def _check_aliases(session: Session, job: str, tenant: str, seen: Mapping[str, Shares]) -> None:
    """Check that no alias of ``tenant`` stands for nothing without a job, where none of those that were ``seen`` would.

    Raises:
        AliasesChanged: there are others than those, or another deletion has left a base model with an alias only this job
            that has succeeded.
    """
    if aliases_of(session, View(tenant, everything=False)) != seen:
        raise AliasesChanged
    record = session.scalars(select(JobRow).where(JobRow.id == job)).one().record()
    base, names = record.model.partition(":")[0], {name for shares in seen.values() for name in shares}
    is_served = record.status == "succeeded" and record.spec  # nothing is, where the document cannot be read
    if is_served and base in names and not rows_on_base(session, tenant, base, 1, have_succeeded=True):
        raise AliasesChanged
