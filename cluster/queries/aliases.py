"""Aliases: names that callers keep while the models behind them change."""

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, cast

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.engine import CursorResult, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from chainfed_ray.cluster.storage import ALIASES
from chainfed_ray.cluster.tables import AliasRow, JobRow
from chainfed_ray.cluster.tenants import DEFAULT_TENANT, View, lock_number
from chainfed_ray.errors import JobNotFound, LimitReached
from chainfed_ray.units import counted

_NUMBER = 0x616C6961  # PostgreSQL's first number of the locks of tenants' aliases
_KEPT_TARGETS = 20  # that an alias had before
_FULL_SECONDS = 60  # until one may have been deleted
Shares = dict[str, float]
"""Models, and the share of the requests that each has."""


class Aliases:
    """The aliases that are seen, in the database behind ``engine``; safe to use from several threads and processes."""

    def __init__(self, engine: Engine, view: View) -> None:
        self._engine, self._view = engine, view

    def all(self) -> dict[str, Shares]:
        """Every alias, with the share that each of its models has of the requests."""
        with Session(self._engine) as session:
            return aliases_of(session, self._view)

    def get(self, name: str) -> Shares | None:
        """What one alias stands for; None if there is none of this name."""
        with Session(self._engine) as session:
            row = session.get(AliasRow, self._view.alias_key(name))
            return row.targets[-1] if row else None

    def set(self, name: str, shares: Shares, jobs: Collection[str] = (), most: int | None = None) -> None:
        """Let an alias stand for other models. What it stood for is kept, so that ``roll_back`` can return to it.

        The models are served as long as ``jobs`` are there: none of these is deleted before the alias is known to whoever
        deletes it. The tenant may have ``most`` aliases.

        Raises:
            JobNotFound: one of ``jobs`` is deleted already.
            LimitReached: the alias would be a new one, and the tenant has as many as it may.
        """
        key = self._view.alias_key(name)
        with suppress(IntegrityError):  # a process of a version without our lock has added it at the same moment
            return self._set(key, shares, jobs, most)
        self._set(key, shares, jobs, most)

    def _set(self, key: str, shares: Shares, jobs: Collection[str], most: int | None) -> None:
        with Session(self._engine) as session, session.begin():
            row = _locked(session, key) or self._locked_alone(session, key)
            if row is None:
                if most is not None:
                    self._check_room(session, most)
                session.add(AliasRow(name=key, targets=[shares]))
            elif row.targets[-1] != shares:
                row.targets = [*row.targets[-_KEPT_TARGETS:], shares]
            session.flush()  # the alias is locked before its jobs, as by who deletes one
            there = select(JobRow.id).where(JobRow.id.in_(jobs), JobRow.deleted_at.is_(None)).order_by(JobRow.id)
            if gone := set(jobs) - set(session.scalars(there.with_for_update(read=True))):
                raise JobNotFound(min(gone))

    def _locked_alone(self, session: Session, key: str) -> AliasRow | None:
        """As ``_locked``, once nobody else makes an alias of the tenant: so no two count those that are there at once.

        On SQLite, who has written is alone already.
        """
        if self._engine.dialect.name == "postgresql":
            session.execute(select(func.pg_advisory_xact_lock(_NUMBER, lock_number(self._view.tenant))))
        return _locked(session, key)

    def _check_room(self, session: Session, most: int) -> None:
        count = session.scalar(select(func.count()).select_from(AliasRow).where(_of(self._view.tenant))) or 0
        if count >= most:
            raise LimitReached(self._view.tenant, counted(count, "alias", "aliases"), ALIASES, _FULL_SECONDS)

    def roll_back(self, name: str, is_served: Callable[[str], bool]) -> Shares | None:
        """Return an alias to what it stood for before, of which every model ``is_served``. None if there is no such thing."""
        with Session(self._engine) as session, session.begin():
            row = _locked(session, self._view.alias_key(name))
            earlier = row.targets[:-1] if row else []
            while earlier and not all(map(is_served, earlier[-1])):  # a job whose alias has moved on may be deleted
                earlier = earlier[:-1]
            if row is None or not earlier:
                return None
            row.targets = earlier
            return earlier[-1]

    def delete(self, name: str) -> bool:
        """Delete an alias. False if there is none of this name."""
        with Session(self._engine) as session, session.begin():
            gone = session.execute(delete(AliasRow).where(AliasRow.name == self._view.alias_key(name)))
            return cast("CursorResult[Any]", gone).rowcount > 0


def aliases_of(session: Session, view: View, locked: bool = False) -> dict[str, Shares]:
    """What each alias that the ``view`` sees stands for. If they are ``locked``, nobody changes one in this transaction."""
    query = select(AliasRow.name, AliasRow.targets).order_by(AliasRow.name)
    if not view.everything:
        query = query.where(_of(view.tenant))
    found = session.execute(query.with_for_update() if locked else query)
    return {view.alias_name(name): targets[-1] for name, targets in found}


def _of(tenant: str) -> ColumnElement[bool]:
    """The condition of a query that an alias is of ``tenant``."""
    of_others = AliasRow.name.contains("/")
    own = AliasRow.name.startswith(f"{tenant}/", autoescape=True)
    return ~of_others if tenant == DEFAULT_TENANT else own


def _locked(session: Session, name: str) -> AliasRow | None:
    """The row of an alias, which no other process may change before the transaction ends; None if there is none.

    It is written first, which locks it, and on SQLite the database: a row that was only read may change until it is written.
    """
    session.execute(update(AliasRow).where(AliasRow.name == name).values(name=name))
    return session.get(AliasRow, name)
