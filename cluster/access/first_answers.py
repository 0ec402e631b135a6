"""The first answers to requests that may be sent again: a repeated ``Idempotency-Key`` gives the same answer, in any process.

A process that carries out a request holds its key for half a minute, and renews that while it works. If it is killed, another
one carries the request out when it comes again. Answers are kept for a week, and of a tenant so many: the oldest go first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from time import time
from typing import Any, cast

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.engine import CursorResult
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from chainfed_ray.cluster.schema import open_tables
from chainfed_ray.cluster.tables import AnswerRow, moment

HELD_SECONDS = 30.0
KEPT_DAYS = 7
KEPT_ANSWERS = 5_000  # of a tenant
KEPT_CHARACTERS = 32 * 2**20  # of the bodies of a tenant's answers

_DROPPED = 1000  # answers at once, at most


@dataclass(frozen=True)
class FirstAnswer:
    """The answer that a request got: its status, its headers and its body."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: str


class Claim(Enum):
    """What is known of a request that has no answer."""

    OURS = "ours"  # it is this process that carries it out
    ELSEWHERE = "elsewhere"  # another one does so now
    ANOTHER = "another"  # the key was used for another request


class FirstAnswers:
    """The answers in the database of jobs at ``url``. ``clock`` gives the Unix time.

    Raises:
        InvalidSetting: as ``open_tables``.
    """

    def __init__(self, url: str, existing: bool = False, clock: Callable[[], float] = time) -> None:
        self._engine, self._clock = open_tables(url, existing), clock

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def claim(self, tenant: str, key: str, digest: str, holder: str) -> FirstAnswer | Claim:
        """The answer to a tenant's request with this key; or whose it is to carry it out.

        ``digest`` is that of the request, and ``holder`` names who asks.
        """
        while True:
            now = self._clock()
            row = AnswerRow(
                tenant=tenant, key=key, digest=digest, holder=holder, held_until=now + HELD_SECONDS, at=moment()
            )
            try:
                with Session(self._engine) as session, session.begin():
                    oldest = moment(datetime.now(UTC) - timedelta(days=KEPT_DAYS))
                    session.execute(delete(AnswerRow).where(AnswerRow.at < oldest))
                    session.add(row)
                return Claim.OURS
            except IntegrityError:
                pass
            with Session(self._engine) as session, session.begin():
                found = session.get(AnswerRow, (tenant, key))
                if found is None:  # it was let go of since
                    continue
                if found.digest != digest:
                    return Claim.ANOTHER
                if found.status is not None:
                    headers = tuple((name, value) for name, value in found.headers or ())
                    return FirstAnswer(found.status, headers, found.body or "")
                if found.held_until > now:
                    return Claim.ELSEWHERE
                same = (*_held(tenant, key, found.holder), AnswerRow.held_until == found.held_until)
                taken = session.execute(
                    update(AnswerRow).where(*same).values(holder=holder, held_until=now + HELD_SECONDS)
                )
                if cast("CursorResult[Any]", taken).rowcount:
                    return Claim.OURS
            # Its holder lives after all, or another process was faster: look again.

    def renew(self, tenant: str, key: str, holder: str) -> bool:
        """Hold the key for a further half minute. False if another process has it by now."""
        return self._change(tenant, key, holder, held_until=self._clock() + HELD_SECONDS)

    def keep(self, tenant: str, key: str, holder: str, answer: FirstAnswer) -> bool:
        """Keep the answer, for those who send the request again. False if another process has the key by now.

        The tenant's oldest answers go if it has more than ``KEPT_ANSWERS`` or ``KEPT_CHARACTERS``.
        """
        headers = [list(pair) for pair in answer.headers]
        kept = self._change(tenant, key, holder, status=answer.status, headers=headers, body=answer.body)
        if kept:
            self._drop_oldest(tenant)
        return kept

    def release(self, tenant: str, key: str, holder: str) -> None:
        """Let go of a key whose request has made nothing: it may be sent again, and changed as well."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(AnswerRow).where(*_held(tenant, key, holder)))

    def forget(self, tenant: str, key: str, answer: FirstAnswer) -> None:
        """Forget an answer, of which nothing is left: the request may be carried out anew. Another answer by now is kept."""
        same = (AnswerRow.tenant == tenant, AnswerRow.key == key)
        with Session(self._engine) as session, session.begin():
            session.execute(
                delete(AnswerRow).where(*same, AnswerRow.status == answer.status, AnswerRow.body == answer.body)
            )

    def _drop_oldest(self, tenant: str) -> None:
        newest = (AnswerRow.at.desc(), AnswerRow.key)
        sums = (
            select(
                AnswerRow.key,
                func.row_number().over(order_by=newest).label("count"),
                func.sum(func.length(AnswerRow.body)).over(order_by=newest, rows=(None, 0)).label("characters"),
            )
            .where(AnswerRow.tenant == tenant, AnswerRow.status.is_not(None))
            .subquery()
        )
        beyond = select(sums.c.key).where(or_(sums.c.count > KEPT_ANSWERS, sums.c.characters > KEPT_CHARACTERS))
        # PostgreSQL: two processes that delete the same rows do not wait for each other in a circle.
        rows = select(AnswerRow.key).where(AnswerRow.tenant == tenant, AnswerRow.key.in_(beyond)).limit(_DROPPED)
        with Session(self._engine) as session, session.begin():
            if found := list(session.scalars(rows.with_for_update(skip_locked=True))):
                session.execute(delete(AnswerRow).where(AnswerRow.tenant == tenant, AnswerRow.key.in_(found)))

    def _change(self, tenant: str, key: str, holder: str, **values: Any) -> bool:
        """Whether ``holder`` has the key, whose row was changed then."""
        with Session(self._engine) as session, session.begin():
            changed = session.execute(update(AnswerRow).where(*_held(tenant, key, holder)).values(**values))
            return bool(cast("CursorResult[Any]", changed).rowcount)


def _held(tenant: str, key: str, holder: str) -> tuple[Any, ...]:
    """The condition that ``holder`` carries out the request, and that it has no answer yet."""
    row = AnswerRow
    return (row.tenant == tenant, row.key == key, row.holder == holder, row.status.is_(None))
