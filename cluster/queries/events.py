"""The events of jobs as they are written, one after the other, and what they say of how often a job's state has changed."""

from collections.abc import Collection
from hashlib import blake2b
from typing import Any, cast, get_args

from sqlalchemy import func, select, update
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session

from chainfed_ray.cluster.tables import EventRow, JobRow, Latest
from chainfed_ray.errors import PreconditionFailed
from chainfed_ray.records.states import AT_WORK, Status

_STATES = get_args(Status)


def lock_job(session: Session, job: str) -> bool:
    """Lock a job's row until the transaction ends: no other process numbers an event meanwhile. False if it is deleted.

    It is written, which on SQLite locks the database.
    """
    there = (JobRow.id == job, JobRow.deleted_at.is_(None))
    locked = session.execute(update(JobRow).where(*there).values(restarts=JobRow.restarts))
    return cast("CursorResult[Any]", locked).rowcount > 0


def append_event(session: Session, job: str, key: str | None, kind: str, at: str, data: dict[str, Any]) -> None:
    """Add the next event. Without a ``key`` it may come again. The caller's transaction must hold the lock of the job's row."""
    seq = (session.scalar(select(func.max(EventRow.seq)).where(EventRow.job == job)) or 0) + 1
    session.add(EventRow(job=job, seq=seq, key=key or f"{kind} {seq}", kind=kind, at=at, data=data))
    session.flush()


def latest_of(session: Session, jobs: Collection[str]) -> dict[str, Latest]:
    """What is new about each of ``jobs``."""
    last = (
        select(EventRow.job, func.max(EventRow.seq).label("seq")).where(EventRow.job.in_(jobs)).group_by(EventRow.job)
    )
    events = last.subquery()
    query = select(JobRow.id, events.c.seq, JobRow.status, JobRow.activity).join(events, events.c.job == JobRow.id)
    return {
        job: Latest(seq, activity if status in AT_WORK else None)
        for job, seq, status, activity in session.execute(query)
    }


def revision_of(session: Session, job: str) -> str:
    """A digest of the event with which a job came to its state. It is another one after each change of the state.

    So it is for each job, and after a restore: events that come then may have the numbers of those that were lost.
    """
    changes = select(EventRow.seq, EventRow.at).where(EventRow.job == job, EventRow.kind.in_(_STATES))
    newest = session.execute(changes.order_by(EventRow.seq.desc()).limit(1)).one_or_none() or (0, "")
    return blake2b(f"{job} {newest[0]} {newest[1]}".encode(), digest_size=8).hexdigest()


def check_revision(session: Session, job: str, revisions: Collection[str] | None) -> None:
    """Check that the revision of a job is one of ``revisions``; None is any.

    Who then acts must hold the lock of the job's row by now: each change of the state takes that first.

    Raises:
        PreconditionFailed: it is none of them.
    """
    if revisions is not None and revision_of(session, job) not in revisions:
        raise PreconditionFailed(job)
