"""Orders for sites and their answers, in the database, and their tensors in ``files``. Any process may die at any time.

An order waits, is taken by a process at the site, and is answered. A process that joins makes what earlier ones had taken wait
again. An order has its name from what it asks, so a coordinator that is made again finds the answer of an order that it gave
before.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any, NamedTuple, cast

from pydantic import ValidationError
from sqlalchemy import and_, delete, func, or_, select, update
from sqlalchemy.engine import CursorResult, Engine
from sqlalchemy.orm import Session

from chainfed_ray.cluster.schema import open_tables
from chainfed_ray.cluster.sites.files import site_files
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.tables import JobRow, SiteOrderRow, SiteRow
from chainfed_ray.cluster.tenants import DEFAULT_TENANT
from chainfed_ray.errors import AnswerRefused, OrderWithdrawn, SiteSuperseded
from chainfed_ray.wire.envelope import KEPT_ANSWER, Answer, Done, Heartbeat, NotDone, Order

_log = logging.getLogger(__name__)

_SILENCE_SECONDS = 60.0
_NOTED_SECONDS = 5.0  # a site that asks more often is not noted each time: that would write to the disk
_IN_FLIGHT = ("waiting", "taken")
_STATES = (*_IN_FLIGHT, "answered", "withdrawn")


def site_address(tenant: str, site: str) -> str:
    """What the mailbox calls the site of a tenant: its name, with the tenant's before it unless that is the default one."""
    return site if tenant == DEFAULT_TENANT else f"{tenant}/{site}"


def over_for(site: str, jobs: Collection[str], going: Mapping[str, str]) -> tuple[str, ...]:
    """Those of ``jobs`` that are over, as ``site`` is told: none of those ``going`` that is of the site's tenant.

    A job of another tenant is to the site as one that never was.
    """
    return tuple(sorted(job for job in {*jobs} if going.get(job) != tenant_of(site)))


def tenant_of(site: str) -> str:
    """The tenant of a site, by its address."""
    return site.rpartition("/")[0] or DEFAULT_TENANT


class OrderState(NamedTuple):
    """Where an order is: its ``state``, its answer if it has one, how far the turn is, and for how many seconds it worked."""

    state: str
    answer: Answer | None
    doing: Heartbeat | None
    worked: float

    @property
    def is_over(self) -> bool:
        """Whether nobody will answer the order any more: it was answered, or withdrawn."""
        return self.answer is not None or self.state == "withdrawn"


@dataclass(frozen=True)
class SiteState:
    """A site as it is known: whether a process of it is there, and when it was last heard, in seconds since 1970."""

    name: str
    joined: bool
    version: str
    seen_at: float


class Mailbox:
    """The orders of every job. Safe to use from several threads and processes."""

    def __init__(self, storage: Storage) -> None:
        self.files = site_files(storage)
        self._engine: Engine = open_tables(storage.database, existing=True)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    # The side of the coordinator.

    def address(self, job: str, site: str) -> str:
        """The site that ``job`` calls ``site``: it is one of the job's own tenant."""
        with Session(self._engine) as session:
            tenant = session.scalar(select(JobRow.tenant).where(JobRow.id == job))
        return site_address(tenant or DEFAULT_TENANT, site)

    def wants_to_stop(self, job: str) -> bool:
        """True if ``job`` is to pause or to end."""
        with Session(self._engine) as session:
            return session.scalar(select(JobRow.status).where(JobRow.id == job)) in ("pausing", "cancelling")

    def give(self, site: str, order: Order) -> None:
        """Give ``order`` to ``site``, unless the site has it or has carried it out. One that failed is given again."""
        with Session(self._engine) as session, session.begin():
            row = session.scalar(_of(site, order.id))
            if row is None:
                digest = order.tensors.sha256 if order.tensors else None
                document = order.model_dump_json()
                known = {"order": order.id, "job": order.job, "tensors": digest, "most_bytes": order.most_bytes}
                session.add(SiteOrderRow(site=site, document=document, **known))
            elif row.state == "withdrawn" or (
                row.answer and isinstance(KEPT_ANSWER.validate_json(row.answer), NotDone)
            ):
                row.state, row.session, row.answer, row.worked, row.doing = "waiting", None, None, 0.0, None

    def states(
        self, orders: Collection[tuple[str, str]], among: Collection[str] = _STATES
    ) -> dict[tuple[str, str], OrderState]:
        """Where each of the ``orders`` is, by its site and id; only of those in one of the states ``among``."""
        row = SiteOrderRow
        columns = select(row.site, row.order, row.state, row.answer, row.doing, row.worked)
        with Session(self._engine) as session:
            wanted = row.order.in_({order for _, order in orders}), row.state.in_(among)
            found = session.execute(columns.where(*wanted))
            return {
                (site, order): OrderState(
                    state,
                    KEPT_ANSWER.validate_json(answer) if answer else None,
                    Heartbeat.model_validate_json(doing) if doing else None,
                    worked,
                )
                for site, order, state, answer, doing, worked in found
                if (site, order) in orders
            }

    def withdraw(self, site: str, order: str) -> None:
        """Take an order back that is not answered yet."""
        with Session(self._engine) as session, session.begin():
            wanted = (SiteOrderRow.site == site, SiteOrderRow.order == order, SiteOrderRow.state.in_(_IN_FLIGHT))
            session.execute(update(SiteOrderRow).where(*wanted).values(state="withdrawn"))

    def forget_others(self, job: str, tensors: str | None) -> None:
        """Delete the turns of ``job`` that were given with other tensors: their round is committed."""
        other = (SiteOrderRow.job == job, SiteOrderRow.tensors.is_not(None), SiteOrderRow.tensors != tensors)
        with Session(self._engine) as session, session.begin():
            old = list(session.scalars(select(SiteOrderRow).where(*other)))
            for row in old:
                self.files.drop_answer(job, row.order)
                session.delete(row)
        for digest in {row.tensors for row in old}:
            if digest:
                self.files.drop_tensors(job, digest)

    def forget(self, job: str) -> None:
        """Delete every order of ``job``, with its files. Sites that work on them notice."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(SiteOrderRow).where(SiteOrderRow.job == job))
        self.files.forget(job)

    def sites(self) -> list[SiteState]:
        """Every site that ever joined, by name."""
        with Session(self._engine) as session:
            rows = session.scalars(select(SiteRow).order_by(SiteRow.name))
            return [SiteState(row.name, _is_there(row), row.version, row.seen_at) for row in rows]

    # The side of the site.

    def join(self, site: str, session: str, version: str) -> None:
        """Let the process ``session`` take the orders of ``site``. What an earlier process had taken waits again."""
        with Session(self._engine) as database, database.begin():
            row = database.get(SiteRow, site)
            if row is None:
                database.add(row := SiteRow(name=site))
            row.session, row.version, row.seen_at = session, version, time()
            self._give_back(database, site, besides=session)

    def leave(self, site: str, session: str) -> None:
        """Let the process ``session`` leave. What it has taken waits for the next one."""
        with Session(self._engine) as database, database.begin():
            self._check(database, site, session)
            database.execute(update(SiteRow).where(SiteRow.name == site).values(session=None, seen_at=time()))
            self._give_back(database, site, besides=None)

    def next(self, site: str, session: str, running: Collection[str] = ()) -> Order | None:
        """The oldest order that waits for ``site``, taken by the process ``session``; None if none waits.

        The process has the orders ``running``. One that it has taken and does not have got lost on its way, and is given again.

        Raises:
            SiteSuperseded: another process of the site has joined since, or this one has left.
        """
        with Session(self._engine) as database, database.begin():
            known = self._check(database, site, session)
            if not 0 <= time() - known.seen_at < _NOTED_SECONDS:
                known.seen_at = time()
            lost = and_(SiteOrderRow.state == "taken", SiteOrderRow.order.not_in(running))
            waits = (SiteOrderRow.site == site, or_(SiteOrderRow.state == "waiting", lost))
            row = database.scalar(select(SiteOrderRow).where(*waits).order_by(SiteOrderRow.number).limit(1))
            if row is None:
                return None
            number, state, job, order = row.number, row.state, row.job, row.order
            document = row.document
        if state == "waiting":  # what an earlier process has sent of its answer does not go with another one's
            self.files.drop_received(job, order)  # outside of a transaction, since it may ask an object store
        with Session(self._engine) as database, database.begin():
            taken = update(SiteOrderRow).where(SiteOrderRow.number == number, SiteOrderRow.state == state)
            try:
                given = Order.model_validate_json(document)
            except ValidationError:
                database.execute(taken.values(state="withdrawn"))
                _log.warning("order %s of job %s is withdrawn: another version of the service has given it", order, job)
                return None
            found = cast("CursorResult[Any]", database.execute(taken.values(state="taken", session=session)))
            return given if found.rowcount else None

    def waiting(self, sites: Collection[str]) -> set[str]:
        """Those of ``sites`` for which an order waits."""
        query = (
            select(SiteOrderRow.site).where(SiteOrderRow.site.in_(sites), SiteOrderRow.state == "waiting").distinct()
        )
        with Session(self._engine) as session:
            return set(session.scalars(query))

    def sessions(self, sites: Collection[str]) -> dict[str, str | None]:
        """The process that takes the orders of each of ``sites``; None if it has left."""
        with Session(self._engine) as session:
            query = select(SiteRow).where(SiteRow.name.in_(sites))
            return {row.name: row.session for row in session.scalars(query)}

    def over(self, site: str, jobs: Collection[str]) -> tuple[str, ...]:
        """Those of ``jobs`` that are over for ``site``: see ``over_for``."""
        return over_for(site, jobs, self.going(jobs))

    def going(self, jobs: Collection[str]) -> dict[str, str]:
        """The tenants of those of ``jobs`` that have orders, which are deleted once a job is over."""
        # All sites of a job are of its tenant, and any of them says which that is.
        query = select(SiteOrderRow.job, func.min(SiteOrderRow.site)).where(SiteOrderRow.job.in_(jobs))
        with Session(self._engine) as session:
            found = session.execute(query.group_by(SiteOrderRow.job))
            return {job: tenant_of(site) for job, site in found}

    def heartbeat(self, site: str, order: str, beat: Heartbeat) -> None:
        """Note how far the turn of ``order`` is.

        Raises:
            OrderWithdrawn: the process does not have the order any more.
        """
        with Session(self._engine) as session, session.begin():
            row = self._taken(session, site, order, beat.session)
            row.doing, row.worked = beat.model_dump_json(), beat.worked
            session.execute(update(SiteRow).where(SiteRow.name == site).values(seen_at=time()))

    def document_of(self, site: str, order: str) -> Path:
        """The file of the document of the job of an order that ``site`` has.

        Raises:
            OrderWithdrawn: the site does not have the order any more.
        """
        with Session(self._engine) as session, session.begin():
            row = self._taken(session, site, order)
            row.worked += 1.0  # a slow transfer is a sign of life as well
            job, document = row.job, Order.model_validate_json(row.document).document
        return self.files.document(job, document.sha256)

    def tensors_of(self, site: str, order: str) -> Path | None:
        """The file of the tensors of an order that ``site`` has; None if it has none.

        Raises:
            OrderWithdrawn: the site does not have the order any more.
        """
        with Session(self._engine) as session, session.begin():
            row = self._taken(session, site, order)
            row.worked += 1.0  # a slow transfer is a sign of life as well
            job, tensors = row.job, row.tensors
        return self.files.tensors(job, tensors) if tensors else None

    def received(self, site: str, order: str) -> int:
        """How many bytes of the answer's tensors have arrived.

        Raises:
            OrderWithdrawn: the site does not have the order any more.
        """
        with Session(self._engine) as session:
            row = self._taken(session, site, order)
            return self.files.received(row.job, row.order)

    def receive(self, site: str, order: str, session: str, offset: int, piece: bytes) -> int:
        """Keep a piece of the answer's tensors, if it is the next one. Gives how many bytes have arrived.

        Raises:
            OrderWithdrawn: the process does not have the order any more.
            AnswerRefused: there are more bytes than the order allows.
        """
        with Session(self._engine) as database, database.begin():
            row = self._taken(database, site, order, session)
            most, job = row.most_bytes, row.job
            row.worked += 1.0  # a slow transfer is a sign of life as well
            database.execute(update(SiteRow).where(SiteRow.name == site).values(seen_at=time()))
        if offset + len(piece) > most:
            raise AnswerRefused(order, f"its tensors have more than {most} bytes")
        return self.files.receive(job, order, offset, piece)

    def answer(self, site: str, order: str, session: str, answer: Answer) -> None:
        """Keep the answer of an order. The same answer may be given again; it counts once.

        Raises:
            OrderWithdrawn: the process does not have the order any more.
            AnswerRefused: the tensors that have arrived are not those that the answer describes.
        """
        text = answer.model_dump_json()
        with Session(self._engine) as database:
            row = database.scalar(_of(site, order))
            if row is not None and row.state == "answered" and row.answer == text:
                return
            row = self._taken(database, site, order, session)
            number, job = row.number, row.job
        described = answer.tensors if isinstance(answer, Done) else None
        if described and not self.files.keep_answer(job, order, described):
            reason = "the tensors that arrived are not those that it describes; send them again"
            raise AnswerRefused(order, reason)
        # The order may have been withdrawn, or given to another process, while the file was looked at.
        still = (SiteOrderRow.number == number, SiteOrderRow.state == "taken", SiteOrderRow.session == session)
        with Session(self._engine) as database, database.begin():
            change = update(SiteOrderRow).where(*still).values(state="answered", answer=text, doing=None)
            if cast("CursorResult[Any]", database.execute(change)).rowcount == 0:
                row = database.scalar(_of(site, order))
                if row is None or (row.state, row.answer) != ("answered", text):
                    raise OrderWithdrawn(order)

    def _taken(self, database: Session, site: str, order: str, session: str | None = None) -> SiteOrderRow:
        """The order, if the process ``session`` has it, or any process of the site."""
        row: SiteOrderRow | None = database.scalar(_of(site, order))
        if row is None or row.state != "taken" or session not in (None, row.session):
            raise OrderWithdrawn(order)
        return row

    def _check(self, database: Session, site: str, session: str) -> SiteRow:
        row = database.get(SiteRow, site)
        if row is None or row.session != session:
            raise SiteSuperseded(site)
        return row

    def _give_back(self, database: Session, site: str, besides: str | None) -> None:
        taken = (
            SiteOrderRow.site == site,
            SiteOrderRow.state == "taken",
            SiteOrderRow.session.is_distinct_from(besides),
        )
        values = {"state": "waiting", "session": None, "doing": None}
        database.execute(update(SiteOrderRow).where(*taken).values(**values))


def _is_there(row: SiteRow) -> bool:
    """True if a process of the site has joined and asks for orders: it does so at least every half a minute."""
    return row.session is not None and time() - row.seen_at < _SILENCE_SECONDS


def _of(site: str, order: str) -> Any:
    return select(SiteOrderRow).where(SiteOrderRow.site == site, SiteOrderRow.order == order)
