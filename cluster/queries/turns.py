"""Whose turn it is: which job of the queue begins next, fairly between tenants and by priority within each."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, cast

from sqlalchemy import func, select, update
from sqlalchemy.engine import CursorResult, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from chainfed_ray.cluster.storage import QUEUED_JOBS
from chainfed_ray.cluster.tables import CountRow, JobRow, TurnRow
from chainfed_ray.errors import LimitReached

_QUEUE_SECONDS = 60  # until a place in a full queue may be free


def next_tenant(waiting: Collection[str], at_work: Mapping[str, int], turns: Mapping[str, int]) -> str:
    """The one of the tenants that are ``waiting`` who has the fewest jobs at work; of equals, whose last turn was longest ago.

    So a tenant with fewer jobs at work than its share is soon served: between two of its turns, each other tenant has one at
    most while it has as few. Those that never had a turn come first.
    """
    return min(waiting, key=lambda tenant: (at_work.get(tenant, 0), turns.get(tenant, 0), tenant))


class Turns:
    """The turns of tenants, in the database behind ``engine``. One process, the controller, gives them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def next(
        self,
        at_work: Mapping[str, int],
        most: int | None,
        besides: Collection[str] = (),
        full: Collection[str] = (),
    ) -> tuple[str, str] | None:
        """The job that begins next and its tenant; None if none may. A tenant may have ``most`` jobs at work.

        The jobs ``besides`` cannot begin yet, nor those of tenants that are ``full``. Of a tenant's jobs, those with the
        greatest priority come first, then the oldest.
        """
        queued = (JobRow.status == "queued", JobRow.id.not_in(besides))
        with Session(self._engine) as session:
            waiting = [
                tenant
                for tenant in session.scalars(select(JobRow.tenant).where(*queued).distinct())
                if tenant not in full and (most is None or at_work.get(tenant, 0) < most)
            ]
            if not waiting:
                return None
            turns = {row.tenant: row.turn for row in session.scalars(select(TurnRow))}
            tenant = next_tenant(waiting, at_work, turns)
            of_tenant = select(JobRow.id).where(*queued, JobRow.tenant == tenant)
            job = session.scalars(of_tenant.order_by(JobRow.priority.desc(), JobRow.number).limit(1)).one_or_none()
        return (job, tenant) if job else None

    def take(self, tenant: str) -> None:
        """Note that ``tenant`` has had a turn."""
        with Session(self._engine) as session, session.begin():
            turn = (session.scalar(select(func.max(TurnRow.turn))) or 0) + 1
            changed = session.execute(update(TurnRow).where(TurnRow.tenant == tenant).values(turn=turn))
            if cast("CursorResult[Any]", changed).rowcount == 0:
                with suppress(IntegrityError):  # another process does the same
                    session.add(TurnRow(tenant=tenant, turn=turn))
                    session.flush()


def check_queue(session: Session, tenant: str, most: int | None, was_paused: bool = False) -> None:
    """Check that ``tenant`` has at most so many jobs in the queue, paused ones counted: a pause makes no room for another job.

    For a job that ``was_paused``, those that still are do not count, or none of many could go on.

    Raises:
        LimitReached: it has more.
    """
    counted = ("queued",) if was_paused else ("queued", "paused")
    found = select(func.sum(CountRow.jobs)).where(CountRow.tenant == tenant, CountRow.status.in_(counted))
    if most is not None and (session.scalar(found) or 0) > most:
        raise LimitReached(
            tenant, f"a queue of {most}{'' if was_paused else ' with its paused jobs'}", QUEUED_JOBS, _QUEUE_SECONDS
        )
