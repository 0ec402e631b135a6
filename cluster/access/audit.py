"""The audit log: who changed what, when, from where, and what came of it; and who was refused."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from threading import Lock
from time import monotonic
from typing import Any

from sqlalchemy import Engine, inspect, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from chainfed_ray.cluster.database import open_database
from chainfed_ray.cluster.schema import open_tables
from chainfed_ray.cluster.tables import AuditRow, moment

_MINUTE = 60.0
REFUSALS_A_MINUTE = 60
_MOST_CHARACTERS = 300
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Act:
    """Something that was done, or refused.

    ``tenant`` and ``key`` are None if it is not known who did it. ``action`` is a route or a command, ``target`` is what it was
    about, ``outcome`` is a status of HTTP, or ``done``.
    """

    tenant: str | None
    key: str | None
    action: str
    target: str
    address: str
    outcome: str
    request: str | None = None


@dataclass(frozen=True)
class Entry(Act):
    """An act on record. ``at`` is ISO 8601 in UTC; later entries have greater numbers."""

    number: int = 0
    at: str = ""


class AuditLog:
    """The audit log in the database of jobs at ``url``. What is in it is never changed: the database refuses to.

    Raises:
        InvalidSetting: as ``open_tables``.
    """

    def __init__(self, url: str, existing: bool = False, clock: Callable[[], float] = monotonic) -> None:
        self._engine, self._clock = open_tables(url, existing), clock
        self._lock, self._minute, self._refusals, self._left_out = Lock(), clock(), 0, 0

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def note(self, act: Act, is_refusal: bool = False) -> None:
        """Put ``act`` on record. It has been done already, so a database that cannot take it down is an error of the log alone.

        Of refusals, only ``REFUSALS_A_MINUTE`` are put on record: everybody can send what is refused.
        """
        if not is_refusal or self._has_room():
            _note(self._engine, act)

    def page(self, limit: int = 100, before: int | None = None) -> list[Entry]:
        """At most ``limit`` entries, the newest first; only those with numbers below ``before``."""
        query = select(AuditRow).order_by(AuditRow.number.desc()).limit(limit)
        if before is not None:
            query = query.where(AuditRow.number < before)
        with Session(self._engine) as session:
            return [_entry(row) for row in session.scalars(query)]

    def _has_room(self) -> bool:
        with self._lock:
            if self._clock() - self._minute >= _MINUTE:
                if self._left_out:
                    _log.warning("%d refusals are not in the audit log", self._left_out)
                self._minute, self._refusals, self._left_out = self._clock(), 0, 0
            self._refusals += 1
            self._left_out += self._refusals > REFUSALS_A_MINUTE
            return self._refusals <= REFUSALS_A_MINUTE


def note_once(url: str, act: Act) -> None:
    """Put ``act`` on record in the database at ``url``, as ``note`` does. Its tables stay of the version that they are.

    Those of a version before the audit log have no place for it.
    """
    engine = open_database(url, existing=True)
    try:
        if inspect(engine).has_table(AuditRow.__tablename__):
            _note(engine, act)
    except SQLAlchemyError as error:
        _log_lost(act, error)
    finally:
        engine.dispose()


def _note(engine: Engine, act: Act) -> None:
    try:
        with Session(engine) as session, session.begin():
            session.add(AuditRow(at=moment(), **{name: _cut(value) for name, value in asdict(act).items()}))
    except SQLAlchemyError as error:
        _log_lost(act, error)


def _log_lost(act: Act, error: SQLAlchemyError) -> None:
    _log.error("not in the audit log (%s): %s", type(error).__name__, act)


def _cut(value: str | None) -> str | None:
    """A text that a caller may have made up, short and without what PostgreSQL does not keep."""
    return None if value is None else value.replace("\0", "�")[:_MOST_CHARACTERS]


def _entry(row: AuditRow) -> Entry:
    values: dict[str, Any] = {name: getattr(row, name) for name in Entry.__dataclass_fields__}
    return Entry(**values)
