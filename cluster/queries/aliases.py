"""Aliases: names that callers keep while the models behind them change."""

from collections.abc import Callable
from contextlib import suppress

from sqlalchemy import select, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from chainfed_ray.cluster.tables import AliasRow
from chainfed_ray.cluster.tenants import DEFAULT_TENANT, View

_KEPT_TARGETS = 20  # that an alias had before
Shares = dict[str, float]
"""Models, and the share of the requests that each has."""


class Aliases:
    """The aliases that are seen, in the database behind ``engine``; safe to use from several threads and processes."""

    def __init__(self, engine: Engine, view: View) -> None:
        self._engine, self._view = engine, view

    def all(self) -> dict[str, Shares]:
        """Every alias, with the share that each of its models has of the requests."""
        query = select(AliasRow).order_by(AliasRow.name)
        if not self._view.everything:
            of_others = AliasRow.name.contains("/")
            own = AliasRow.name.startswith(f"{self._view.tenant}/", autoescape=True)
            query = query.where(~of_others if self._view.tenant == DEFAULT_TENANT else own)
        with Session(self._engine) as session:
            return {self._view.alias_name(row.name): row.targets[-1] for row in session.scalars(query)}

    def get(self, name: str) -> Shares | None:
        """What one alias stands for; None if there is none of this name."""
        with Session(self._engine) as session:
            row = session.get(AliasRow, self._view.alias_key(name))
            return row.targets[-1] if row else None

    def set(self, name: str, shares: Shares) -> None:
        """Let an alias stand for other models. What it stood for is kept, so that ``roll_back`` can return to it."""
        key = self._view.alias_key(name)
        with suppress(IntegrityError):  # another process adds it at the same moment
            return self._set(key, shares)
        self._set(key, shares)

    def _set(self, name: str, shares: Shares) -> None:
        with Session(self._engine) as session, session.begin():
            # Write first, to lock the row (on SQLite, the database): no other process may change it meanwhile.
            session.execute(update(AliasRow).where(AliasRow.name == name).values(name=name))
            row = session.get(AliasRow, name)
            if row is None:
                session.add(AliasRow(name=name, targets=[shares]))
            elif row.targets[-1] != shares:
                row.targets = [*row.targets[-_KEPT_TARGETS:], shares]

    def roll_back(self, name: str, is_served: Callable[[str], bool]) -> Shares | None:
        """Return an alias to what it stood for before, of which every model ``is_served``. None if there is no such thing."""
        with Session(self._engine) as session, session.begin():
            row = session.get(AliasRow, self._view.alias_key(name), with_for_update=True)
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
            row = session.get(AliasRow, self._view.alias_key(name))
            if row:
                session.delete(row)
            return row is not None
