"""The database of jobs: their specifications, states, results and events (SQLite, or PostgreSQL by URL).

Any number of processes may write. A change of state is one transaction that checks the state before it: if another process
was faster, it changes nothing. An event has a key that is written only once, so a coordinator that was killed may publish
all its events again. ::

    queued ──► validating ──► running ──► succeeded | failed
       ▲            │            │ ▲
       │            ▼            ▼ │
       └─ paused ◄───── pausing ───┘

A job that was validated before goes on from ``queued`` without that. One that fails while it is validated is ``failed`` too.
One that is not over may be cancelled: it is ``cancelling`` until its processes have ended, and then ``cancelled``.
"""

from collections.abc import Collection, Iterable
from copy import copy
from dataclasses import replace
from itertools import islice
from secrets import token_hex
from typing import Any, Self, cast

from sqlalchemy import ColumnElement, Select, and_, func, select, text, true, tuple_, update
from sqlalchemy.engine import CursorResult
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from chainfed_ray.activity import Activity
from chainfed_ray.cluster.files.kept_bytes import KeptBytes, check_kept
from chainfed_ray.cluster.files.upload_sources import hold_uploads
from chainfed_ray.cluster.queries.aliases import Aliases
from chainfed_ray.cluster.queries.counts import counts
from chainfed_ray.cluster.queries.deletions import Deletions
from chainfed_ray.cluster.queries.events import append_event, check_revision, latest_of, lock_job, revision_of
from chainfed_ray.cluster.queries.lines import JobLine, lines_of, newest_lines
from chainfed_ray.cluster.queries.newest_models import NewestModels
from chainfed_ray.cluster.queries.pages import Label, Place, page_of
from chainfed_ray.cluster.queries.rounds import Rounds
from chainfed_ray.cluster.queries.served_names import STARTED, rows_on_base, served_name
from chainfed_ray.cluster.queries.turns import Turns, check_queue
from chainfed_ray.cluster.schema import open_tables
from chainfed_ray.cluster.tables import ROW_VERSION, Event, EventRow, JobRecord, JobRow, LabelRow, Latest, moment
from chainfed_ray.cluster.tenants import DEFAULT_TENANT, View
from chainfed_ray.cluster.tracing import carried
from chainfed_ray.errors import JobConflict, JobNotFound
from chainfed_ray.records.states import AT_WORK, FINISHED, STATES_BEFORE, Status
from chainfed_ray.spec.job import JobSpec


class JobStore:
    """The jobs in the database at ``url``; safe to use from several threads and processes.

    Its tables are made if they are missing, and so is the file of SQLite unless it must be an ``existing`` one. A file that is
    removed while it is in use is a database that does not answer: what we wrote into it would be lost.

    Every job, model and alias belongs to a tenant. ``seen_by`` gives the part of them that a tenant sees, and no other part of
    the program need know of tenants. A model of another tenant is called ``<tenant>/<base>:<name>``, and an alias alike.

    Raises:
        InvalidSetting: ``url`` is not an SQLAlchemy URL, its driver is not installed, or its database has another version.
    """

    def __init__(self, url: str, existing: bool = False) -> None:
        self._engine = open_tables(url, existing)
        self._view = View()
        self._revisions: Collection[str] | None = None
        self.rounds, self._newest_models = Rounds(self._engine), NewestModels(self._engine)
        self.turns = Turns(self._engine)  # of the tenants, to have a job begin
        self.kept_bytes = KeptBytes(self._engine)

    def seen_by(self, tenant: str, everything: bool) -> Self:
        """These jobs as ``tenant`` sees them, who submits jobs of its own: its own ones alone, unless it sees ``everything``.

        What it does not see is for it as if it were not there.
        """
        part = copy(self)
        part._view = View(tenant, everything)
        return part

    def at(self, revisions: Collection[str] | None) -> Self:
        """These jobs, of which one is moved or deleted only while its revision is one of ``revisions``; None is any."""
        part = copy(self)
        part._revisions = revisions
        return part

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def check(self) -> None:
        """Run a trivial query. It raises an error if the database does not answer."""
        with Session(self._engine) as session:
            session.execute(text("select 1"))

    def submit(
        self,
        spec: JobSpec,
        request_key: str | None = None,
        reads_anything: bool = True,
        most_queued: int | None = None,
        most_stored: int | None = None,
    ) -> JobRecord:
        """Queue a job. If an earlier call had the same ``request_key``, return the job that it queued instead.

        See ``JobRecord`` for ``reads_anything``. The tenant may have ``most_queued`` queued jobs, and ``most_stored`` bytes.

        Raises:
            InvalidJob: it names an upload that is not the tenant's, or not complete.
            JobConflict: the earlier call had another specification.
            LimitReached: the tenant has as many jobs in the queue, or bytes, as it may.
        """
        document, key = spec.document(), request_key
        if key is not None and self._view.tenant != DEFAULT_TENANT:
            key = f"{self._view.tenant}\n{key}"  # no key that a caller gives has a line break
        row = JobRow(
            id=f"{spec.name}-{token_hex(4)}",
            name=spec.name,
            model=spec.model_name,
            spec=document,
            status="queued",
            submitted_at=moment(),
            request_key=key,
            reads_anything=reads_anything,
            tenant=self._view.tenant,
            priority=spec.priority,
        )
        try:
            with Session(self._engine) as session, session.begin():
                session.add(row)
                session.flush()  # before the name is chosen: two that submit at once then come one after the other
                row.model = served_name(session, row, spec.model.base)
                session.add_all(LabelRow(job=row.id, name=name, value=value) for name, value in spec.labels.items())
                hold_uploads(session, row.tenant, document)
                check_queue(session, row.tenant, most_queued)
                check_kept(session, row.tenant, most_stored)
                append_event(session, row.id, "queued", "queued", row.submitted_at, carried())
                return self._record(row)
        except IntegrityError:
            if key is None:
                raise
        with Session(self._engine) as session:
            earlier = self._record(session.scalars(select(JobRow).where(JobRow.request_key == key)).one())
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
            row = session.scalars(select(JobRow).where(self._seen, JobRow.id == job)).one_or_none()
            if row is None:
                raise JobNotFound(job)
            return self._record(row)

    def page(
        self,
        limit: int = 100,
        after: Place | None = None,
        status: Status | Collection[Status] | None = None,
        labels: Iterable[Label] = (),
    ) -> list[JobRecord]:
        """At most ``limit`` jobs, the newest first: those ``after`` a place, in a state of ``status``, with all ``labels``."""
        return self._found(page_of(self._seen, limit, after, status, labels))

    def lines(
        self,
        limit: int = 100,
        after: Place | None = None,
        status: Status | Collection[Status] | None = None,
        labels: Iterable[Label] = (),
    ) -> list[JobLine]:
        """As ``page``, with what a list shows of each job."""
        if after is None and status is None and not labels:
            return newest_lines(self._engine, self._view, limit)
        return lines_of(self._engine, self._view, page_of(self._seen, limit, after, status, labels))

    def counts(self) -> dict[str, dict[Status, int]]:
        """How many jobs each tenant has in each state, of those that are seen. Tenants and states without jobs are missing."""
        return counts(self._engine, self._view)

    def states(self, jobs: Collection[str]) -> dict[str, Status]:
        """The state of each of ``jobs`` that is there."""
        with Session(self._engine) as session:
            found = session.execute(select(JobRow.id, JobRow.status).where(JobRow.id.in_(jobs)))
            return {job: cast("Status", status) for job, status in found}

    def queue(self, limit: int) -> list[JobRecord]:
        """At most ``limit`` queued jobs, the oldest first."""
        return self._found(select(JobRow).where(JobRow.status == "queued").order_by(JobRow.number).limit(limit))

    def models(self, first: str | None = None, limit: int | None = None) -> list[JobRecord]:
        """For each model name the newest job that succeeded, sorted by that name: at most ``limit``, from ``first`` on."""
        succeeded = select(func.max(JobRow.number)).where(self._seen, JobRow.status == "succeeded")
        newest = succeeded.group_by(JobRow.tenant, JobRow.model)
        query = select(JobRow).where(JobRow.number.in_(newest)).order_by(JobRow.model, JobRow.tenant)
        if first is not None:
            tenant, own = self._view.parts(first)
            query = query.where(tuple_(JobRow.model, JobRow.tenant) >= (own, tenant or ""))
        query = query.execution_options(yield_per=limit or 1000)
        with Session(self._engine) as session, session.scalars(query) as rows:
            return list(islice((record for record in map(self._record, rows) if record.spec), limit))

    def model(self, name: str) -> JobRecord | None:
        """The newest job that succeeded and whose model is called ``name``."""
        found = self._newest_models.of(*self._view.parts(name))
        return replace(found, model=self._view.name(found.tenant, found.model)) if found else None

    def of_model(self, name: str, limit: int = 100) -> list[JobRecord]:
        """At most ``limit`` jobs that have started or succeeded and whose model is called ``name``, the newest first."""
        tenant, own = self._view.parts(name)
        query = select(JobRow).where(JobRow.tenant == tenant, JobRow.model == own, *STARTED)
        return [record for record in self._found(query.order_by(JobRow.number.desc()).limit(limit)) if record.spec]

    def bases(self) -> list[JobRecord]:
        """For each base model's name, the newest job that has started or succeeded on it, sorted by that name.

        Such a job has been checked, so its base model is there and can be loaded.
        """
        checked = select(func.max(JobRow.number)).where(self._seen, *STARTED)
        newest = checked.group_by(JobRow.tenant, JobRow.model)
        query = select(JobRow).where(JobRow.number.in_(newest)).order_by(JobRow.number)
        found = {record.model.partition(":")[0]: record for record in self._found(query) if record.spec}
        return [found[name] for name in sorted(found)]

    def on_base(self, name: str, limit: int, have_succeeded: bool = False) -> list[JobRecord]:
        """At most ``limit`` jobs on a base model called ``name``, the newest first (see ``rows_on_base``)."""
        tenant, own = self._view.parts(name)
        with Session(self._engine) as session:
            records = map(self._record, rows_on_base(session, tenant, own, limit, have_succeeded))
            return [record for record in records if record.spec]

    def model_names(self, limit: int) -> list[str]:
        """The names of at most ``limit`` models of jobs that succeeded, sorted."""
        query = select(JobRow.tenant, JobRow.model).where(self._seen, JobRow.status == "succeeded").distinct()
        with Session(self._engine) as session:
            found = session.execute(query.order_by(JobRow.model).limit(limit))
            return sorted(self._view.name(tenant, model) for tenant, model in found)

    @property
    def aliases(self) -> Aliases:
        """Other names of the models that are seen."""
        return Aliases(self._engine, self._view)

    @property
    def deletions(self) -> Deletions:
        """The jobs, of all tenants, that are being deleted."""
        return Deletions(self._engine, self._revisions)

    def move(
        self,
        job: str,
        to: Status,
        *,
        result: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
        before: tuple[Status, ...] | None = None,
        most_queued: int | None = None,
        most_stored: int | None = None,
    ) -> bool:
        """Move a job to the state ``to``, and record the event. False if that is not possible from the job's present state.

        With ``before``, only from those of the possible states. The job's tenant may have ``most_queued`` jobs in the queue,
        and ``most_stored`` bytes.

        Raises:
            LimitReached: the job would go into the queue, and the tenant has as many jobs there, or bytes, as it may.
            InvalidJob: the job would go into the queue, and an upload that it reads is there no more.
            PreconditionFailed: the job has another revision than those that it is to have (see ``at``).
        """
        now = moment()
        values: dict[str, Any] = {"status": to, "version": ROW_VERSION}
        if to in ("validating", "running"):
            values["started_at"] = func.coalesce(JobRow.started_at, now)
        if to in FINISHED:
            values |= {"finished_at": now, "result": result, "error": error}
        if to not in AT_WORK:
            values["activity"] = None
        if to == "queued":
            values |= {"finished_at": None, "result": None, "error": None, "restarts": 0}
        possible = STATES_BEFORE[to] if before is None else [state for state in STATES_BEFORE[to] if state in before]
        with Session(self._engine) as session, session.begin():
            changed = session.execute(
                update(JobRow)
                .where(JobRow.id == job, JobRow.status.in_(possible), JobRow.deleted_at.is_(None))
                .values(**values)
            )
            if cast("CursorResult[Any]", changed).rowcount == 0:
                return False
            check_revision(session, job, self._revisions)
            if to == "queued":
                tenant, document = session.execute(select(JobRow.tenant, JobRow.spec).where(JobRow.id == job)).one()
                hold_uploads(session, tenant, document or {})
                check_queue(session, tenant, most_queued, was_paused=before == ("paused",))
                check_kept(session, tenant, most_stored)
            append_event(session, job, None, to, now, error or (carried() if to == "queued" else {}))
        return True

    def note_activity(self, job: str, activity: Activity) -> None:
        """Record what a job is doing, in place of what was recorded. Does nothing unless the job is at work."""
        values = {"activity": activity.model_dump(mode="json")}
        with Session(self._engine) as session, session.begin():
            session.execute(update(JobRow).where(JobRow.id == job, JobRow.status.in_(AT_WORK)).values(**values))

    def latest(self, jobs: Collection[str]) -> dict[str, Latest]:
        """What is new about each of ``jobs``."""
        with Session(self._engine) as session:
            return latest_of(session, jobs)

    def revision(self, job: str) -> str:
        """The revision of a job (see ``revision_of``)."""
        _check_id(job)
        with Session(self._engine) as session:
            return revision_of(session, job)

    def check_revision(self, job: str) -> None:
        """Raise ``PreconditionFailed`` if the job has another revision than those that it is to have (see ``at``)."""
        with Session(self._engine) as session:
            check_revision(session, job, self._revisions)

    def count_restart(self, job: str) -> int:
        """Count a restart of the job's coordinator. Returns how many since the last finished round; 0 if the job is gone."""
        with Session(self._engine) as session, session.begin():
            session.execute(update(JobRow).where(JobRow.id == job).values(restarts=JobRow.restarts + 1))
            return session.scalar(select(JobRow.restarts).where(JobRow.id == job)) or 0

    def publish(self, job: str, key: str, kind: str, data: dict[str, Any]) -> None:
        """Append an event, unless the job has one with this ``key``, or is deleted: its process may not know that yet."""
        told = select(EventRow.seq).where(EventRow.job == job, EventRow.key == key)
        with Session(self._engine) as session, session.begin():
            if lock_job(session, job) and session.scalar(told) is None:
                append_event(session, job, key, kind, moment(), data)
                session.execute(update(JobRow).where(JobRow.id == job).values(restarts=0))

    def events(self, job: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """At most ``limit`` events of a job with numbers above ``after``, the oldest first.

        Raises:
            JobNotFound: there is no such job.
        """
        if not self._view.everything:
            self.get(job)
        query = select(EventRow).where(EventRow.job == job, EventRow.seq > after).order_by(EventRow.seq).limit(limit)
        with Session(self._engine) as session:
            found = [Event(row.seq, row.kind, row.at, row.data) for row in session.scalars(query)]
        if not found:
            self.get(job)
        return found

    def of_kind(self, job: str, *kinds: str) -> list[Event]:
        """Every event of a job of one of the ``kinds``, the oldest first."""
        query = select(EventRow).where(EventRow.job == job, EventRow.kind.in_(kinds)).order_by(EventRow.seq)
        with Session(self._engine) as session:
            return [Event(row.seq, row.kind, row.at, row.data) for row in session.scalars(query)]

    def newest(self, job: str, kind: str) -> Event | None:
        """The job's newest event of this kind, or None."""
        return next(iter(self.newest_of(job, kind, 1)), None)

    def newest_of(self, job: str, kind: str, limit: int) -> list[Event]:
        """At most ``limit`` events of a job of this kind, the newest first."""
        of_kind = select(EventRow).where(EventRow.job == job, EventRow.kind == kind)
        with Session(self._engine) as session:
            found = session.scalars(of_kind.order_by(EventRow.seq.desc()).limit(limit))
            return [Event(row.seq, row.kind, row.at, row.data) for row in found]

    @property
    def _seen(self) -> ColumnElement[bool]:
        """The condition of a query that a job is seen."""
        is_own = true() if self._view.everything else JobRow.tenant == self._view.tenant
        return and_(is_own, JobRow.deleted_at.is_(None))

    def _found(self, query: Select[JobRow]) -> list[JobRecord]:
        with Session(self._engine) as session:
            return [self._record(row) for row in session.scalars(query)]

    def _record(self, row: JobRow) -> JobRecord:
        return replace(row.record(), model=self._view.name(row.tenant, row.model))


def _check_id(job: str) -> None:
    if "\0" in job:  # no id has one, and PostgreSQL raises an error of its own when it is asked for it
        raise JobNotFound(job)
