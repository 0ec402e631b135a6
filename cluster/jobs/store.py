"""The database of jobs: their specifications, states, results and events (SQLite, or PostgreSQL by URL).

Any number of processes may write. A change of state is one transaction that checks the state before it: if another process
was faster, it changes nothing. An event has a key that is written only once, so a coordinator that was killed may publish
all its events again. ::

    queued ──► running ──► succeeded | failed
       │          └──► cancelling ──► cancelled
       └──────────────────────────────► cancelled
"""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any, Literal, NamedTuple, cast

from sqlalchemy import JSON, ForeignKey, UniqueConstraint, func, select, text, update
from sqlalchemy.engine import CursorResult, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from chainfed_ray.activity import Activity
from chainfed_ray.cluster.jobs.database import open_database
from chainfed_ray.errors import InvalidSetting, JobConflict, JobNotFound
from chainfed_ray.record import VERSION
from chainfed_ray.spec.job import JobSpec

Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
FINISHED: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})
_CHECKED: tuple[Status, ...] = ("running", "succeeded")  # jobs whose base model is known to load
_BEFORE: dict[Status, tuple[Status, ...]] = {
    "running": ("queued",),
    "cancelling": ("running",),
    "cancelled": ("queued", "cancelling"),
    "succeeded": ("running",),
    "failed": ("running",),
}


@dataclass(frozen=True)
class JobRecord:
    """A job in the database.

    Times are ISO 8601 in UTC. ``restarts`` counts how often a coordinator died since the last finished round.
    ``activity`` is what the job is doing, as JSON; None unless it is running.
    """

    id: str
    name: str
    model: str
    spec: dict[str, Any]
    status: Status
    restarts: int
    submitted_at: str
    started_at: str | None
    finished_at: str | None
    activity: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None


@dataclass(frozen=True)
class Event:
    """An event of a job. ``seq`` numbers the events of one job from 1."""

    seq: int
    kind: str
    at: str
    data: dict[str, Any]


class Latest(NamedTuple):
    """The number of a job's newest event; and what the job is doing, as JSON, unless it is not running."""

    seq: int
    activity: dict[str, Any] | None


class JobStore:
    """The jobs in the database at ``url``; safe to use from several threads and processes.

    Its tables are made if they are missing, and so is the file of SQLite unless it must be an ``existing`` one. A file that is
    removed while it is in use is a database that does not answer: what we wrote into it would be lost.

    Raises:
        InvalidSetting: ``url`` is not an SQLAlchemy URL, its driver is not installed, or its database has another version.
    """

    def __init__(self, url: str, existing: bool = False) -> None:
        self._engine = open_database(url, existing)
        try:
            _make_tables(self._engine)
            _check_version(self._engine)
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def check(self) -> None:
        """Run a trivial query. It raises an error if the database does not answer."""
        with Session(self._engine) as session:
            session.execute(text("select 1"))

    def submit(self, spec: JobSpec, request_key: str | None = None) -> JobRecord:
        """Queue a job. If an earlier call had the same ``request_key``, return the job that it queued instead.

        Raises:
            JobConflict: the earlier call had another specification.
        """
        document = spec.document()
        row = _Job(
            id=f"{spec.name}-{token_hex(4)}",
            name=spec.name,
            model=spec.model_name,
            spec=document,
            status="queued",
            submitted_at=_now(),
            request_key=request_key,
        )
        try:
            with Session(self._engine) as session, session.begin():
                session.add(row)
                session.flush()
                _append(session, row.id, "queued", "queued", row.submitted_at, {})
                return row.record()
        except IntegrityError:
            if request_key is None:
                raise
        with Session(self._engine) as session:
            earlier = session.scalars(select(_Job).where(_Job.request_key == request_key)).one().record()
        if earlier.spec != document:
            raise JobConflict(earlier.id, earlier.status, "be submitted again with another specification") from None
        return earlier

    def get(self, job: str) -> JobRecord:
        """The job with the id ``job``.

        Raises:
            JobNotFound: there is no such job.
        """
        _check_id(job)
        with Session(self._engine) as session:
            row = session.scalars(select(_Job).where(_Job.id == job)).one_or_none()
            if row is None:
                raise JobNotFound(job)
            return row.record()

    def page(self, limit: int = 100, before: str | None = None, status: Status | None = None) -> list[JobRecord]:
        """At most ``limit`` jobs, the newest first; only those older than the job ``before``, and in the state ``status``.

        Raises:
            JobNotFound: there is no job with the id ``before``.
        """
        query = select(_Job).order_by(_Job.number.desc()).limit(limit)
        if status is not None:
            query = query.where(_Job.status == status)
        with Session(self._engine) as session:
            if before is not None:
                _check_id(before)
                number = session.scalar(select(_Job.number).where(_Job.id == before))
                if number is None:
                    raise JobNotFound(before)
                query = query.where(_Job.number < number)
            return [row.record() for row in session.scalars(query)]

    def count(self) -> dict[Status, int]:
        """How many jobs are in each state. States without jobs are missing."""
        query = select(_Job.status, func.count()).group_by(_Job.status)
        with Session(self._engine) as session:
            return {cast("Status", status): count for status, count in session.execute(query)}

    def queue(self, limit: int) -> list[JobRecord]:
        """At most ``limit`` queued jobs, the oldest first."""
        query = select(_Job).where(_Job.status == "queued").order_by(_Job.number).limit(limit)
        with Session(self._engine) as session:
            return [row.record() for row in session.scalars(query)]

    def models(self) -> list[JobRecord]:
        """For each model name the newest job that succeeded, sorted by that name."""
        newest = select(func.max(_Job.number)).where(_Job.status == "succeeded").group_by(_Job.model)
        query = select(_Job).where(_Job.number.in_(newest)).order_by(_Job.model)
        with Session(self._engine) as session:
            return [row.record() for row in session.scalars(query)]

    def model(self, name: str) -> JobRecord | None:
        """The newest job that succeeded and whose model is called ``name``."""
        if "\0" in name:  # as for ids
            return None
        query = select(_Job).where(_Job.model == name, _Job.status == "succeeded").order_by(_Job.number.desc()).limit(1)
        with Session(self._engine) as session:
            row = session.scalars(query).one_or_none()
            return row.record() if row else None

    def bases(self) -> list[JobRecord]:
        """For each base model's name, the newest job that runs or succeeded on it, sorted by that name.

        Such a job has been checked, so its base model is there and can be loaded.
        """
        newest = select(func.max(_Job.number)).where(_Job.status.in_(_CHECKED)).group_by(_Job.model)
        query = select(_Job).where(_Job.number.in_(newest)).order_by(_Job.number)
        with Session(self._engine) as session:
            found = {row.model.partition(":")[0]: row.record() for row in session.scalars(query)}
        return [found[name] for name in sorted(found)]

    def on_base(self, name: str, limit: int) -> list[JobRecord]:
        """At most ``limit`` jobs that run or succeeded on a base model called ``name``, the newest first."""
        if "\0" in name:
            return []
        of_base = _Job.model.startswith(f"{name}:", autoescape=True)
        query = select(_Job).where(of_base, _Job.status.in_(_CHECKED)).order_by(_Job.number.desc()).limit(limit)
        with Session(self._engine) as session:
            return [row.record() for row in session.scalars(query)]

    def model_names(self, limit: int) -> list[str]:
        """The names of at most ``limit`` models of jobs that succeeded, sorted."""
        query = select(_Job.model).where(_Job.status == "succeeded").distinct().order_by(_Job.model).limit(limit)
        with Session(self._engine) as session:
            return list(session.scalars(query))

    def move(
        self,
        job: str,
        to: Status,
        *,
        result: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> bool:
        """Move a job to the state ``to``, and record the event. False if that is not possible from the job's present state."""
        now = _now()
        values: dict[str, Any] = {"status": to}
        if to == "running":
            values["started_at"] = now
        if to in FINISHED:
            values |= {"finished_at": now, "activity": None, "result": result, "error": error}
        with Session(self._engine) as session, session.begin():
            changed = session.execute(update(_Job).where(_Job.id == job, _Job.status.in_(_BEFORE[to])).values(**values))
            if cast("CursorResult[Any]", changed).rowcount == 0:
                return False
            _append(session, job, key=to, kind=to, at=now, data=error or {})
        return True

    def note_activity(self, job: str, activity: Activity) -> None:
        """Record what a job is doing, in place of what was recorded. Does nothing unless the job is running."""
        values = {"activity": activity.model_dump(mode="json")}
        with Session(self._engine) as session, session.begin():
            session.execute(update(_Job).where(_Job.id == job, _Job.status == "running").values(**values))

    def latest(self, jobs: Collection[str]) -> dict[str, Latest]:
        """What is new about each of ``jobs``."""
        last = select(_Event.job, func.max(_Event.seq).label("seq")).where(_Event.job.in_(jobs)).group_by(_Event.job)
        events = last.subquery()
        query = select(_Job.id, events.c.seq, _Job.status, _Job.activity).join(events, events.c.job == _Job.id)
        with Session(self._engine) as session:
            return {
                job: Latest(seq, activity if status == "running" else None)
                for job, seq, status, activity in session.execute(query)
            }

    def count_restart(self, job: str) -> int:
        """Count a restart of the job's coordinator. Returns how many there were since the last finished round."""
        with Session(self._engine) as session, session.begin():
            session.execute(update(_Job).where(_Job.id == job).values(restarts=_Job.restarts + 1))
            return session.scalars(select(_Job.restarts).where(_Job.id == job)).one()

    def publish(self, job: str, key: str, kind: str, data: dict[str, Any]) -> None:
        """Append an event, unless the job has one with this ``key``."""
        with Session(self._engine) as session, session.begin():
            # Write first, to lock the job's row (on SQLite, the database): no other process may number an event meanwhile.
            session.execute(update(_Job).where(_Job.id == job).values(restarts=_Job.restarts))
            if session.scalar(select(_Event.seq).where(_Event.job == job, _Event.key == key)) is None:
                _append(session, job, key, kind, _now(), data)
                session.execute(update(_Job).where(_Job.id == job).values(restarts=0))

    def events(self, job: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """At most ``limit`` events of a job with numbers above ``after``, the oldest first.

        Raises:
            JobNotFound: there is no such job.
        """
        query = select(_Event).where(_Event.job == job, _Event.seq > after).order_by(_Event.seq).limit(limit)
        with Session(self._engine) as session:
            found = [Event(row.seq, row.kind, row.at, row.data) for row in session.scalars(query)]
        if not found:
            self.get(job)
        return found

    def newest(self, job: str, kind: str) -> Event | None:
        """The job's newest event of this kind, or None."""
        query = select(_Event).where(_Event.job == job, _Event.kind == kind).order_by(_Event.seq.desc()).limit(1)
        with Session(self._engine) as session:
            row = session.scalars(query).one_or_none()
            return Event(row.seq, row.kind, row.at, row.data) if row else None


class _Base(DeclarativeBase):
    pass


class _Job(_Base):
    __tablename__ = "jobs"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(index=True)
    model: Mapped[str] = mapped_column(index=True)
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    status: Mapped[str] = mapped_column(index=True)
    restarts: Mapped[int] = mapped_column("starts", default=0)
    submitted_at: Mapped[str]
    started_at: Mapped[str | None] = mapped_column(default=None)
    finished_at: Mapped[str | None] = mapped_column(default=None)
    activity: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    request_key: Mapped[str | None] = mapped_column(unique=True, default=None)

    def record(self) -> JobRecord:
        return JobRecord(
            id=self.id,
            name=self.name,
            model=self.model,
            spec=self.spec,
            status=cast("Status", self.status),
            restarts=self.restarts,
            submitted_at=self.submitted_at,
            started_at=self.started_at,
            finished_at=self.finished_at,
            activity=self.activity if self.status == "running" else None,
            result=self.result,
            error=self.error,
        )


class _Event(_Base):
    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("job", "key"),)

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    key: Mapped[str]
    kind: Mapped[str]
    at: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(JSON)


class _Schema(_Base):
    __tablename__ = "schema"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


def _make_tables(engine: Engine) -> None:
    """Make the tables that are missing.

    ``create_all`` fails if another process makes a table at the same moment. Each further try has a table fewer to make.
    """
    for _ in _Base.metadata.tables:
        with suppress(DBAPIError):
            _Base.metadata.create_all(engine)
            return
    _Base.metadata.create_all(engine)


def _check_version(engine: Engine) -> None:
    """Check that the tables have the version that this code writes. A database without jobs is marked with this version."""
    with Session(engine) as session:
        found = session.scalar(select(func.max(_Schema.version)))
        if found is None and session.scalar(select(_Job.id).limit(1)) is None:
            with suppress(IntegrityError):  # another process marks it at the same moment
                session.add(_Schema(version=VERSION))
                session.commit()
            return
    if found != VERSION:
        shown = engine.url.render_as_string()  # without the password
        writer = "an earlier chainfed-ray" if found is None or found < VERSION else "a later chainfed-ray"
        raise InvalidSetting(
            "CHAINFED_DATABASE", shown, f"a database of version {VERSION}; this one was written by {writer}"
        )


def _check_id(job: str) -> None:
    """No id has a null character, and PostgreSQL raises an error of its own when it is asked for one."""
    if "\0" in job:
        raise JobNotFound(job)


def _append(session: Session, job: str, key: str, kind: str, at: str, data: dict[str, Any]) -> None:
    """Add the next event. The caller's transaction must hold the lock of the job's row."""
    seq = (session.scalar(select(func.max(_Event.seq)).where(_Event.job == job)) or 0) + 1
    session.add(_Event(job=job, seq=seq, key=key, kind=kind, at=at, data=data))
    session.flush()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
