"""The tables of the database of jobs. ``migrations`` makes them, and brings those of earlier versions forward."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    TypeDecorator,
    UniqueConstraint,
    text,
    true,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from chainfed_ray.cluster.tenants import DEFAULT_TENANT
from chainfed_ray.records.states import AT_WORK, Status

ROW_VERSION = 2
"""Of a row of a job: rows of version 1 are from before the states ``validating``, ``pausing`` and ``paused``."""


@dataclass(frozen=True)
class JobRecord:
    """A job in the database.

    Times are ISO 8601 in UTC. ``spec`` is empty if the document cannot be read. ``restarts`` counts how often a coordinator
    died since the last finished round. ``activity`` is what the job is doing, as JSON; None unless it is at work.
    ``reads_anything`` says that it may read what the service can read, where the service's rules say nothing. ``version`` is
    that of the code which last moved the job.
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
    reads_anything: bool = True
    tenant: str = DEFAULT_TENANT
    version: int = ROW_VERSION
    priority: int = 0


@dataclass(frozen=True)
class Event:
    """An event of a job. ``seq`` numbers the events of one job from 1."""

    seq: int
    kind: str
    at: str
    data: dict[str, Any]


class Latest(NamedTuple):
    """The number of a job's newest event; and what the job is doing, as JSON, unless it is not at work."""

    seq: int
    activity: dict[str, Any] | None


class _Table(DeclarativeBase):
    pass


class _Kept(TypeDecorator[Any]):
    """A JSON document of a row. One that cannot be read is None, so that it is the trouble of its own job and of no other."""

    impl = JSON
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        """See SQLAlchemy: what makes a value of a column's text."""
        read = super().result_processor(dialect, coltype)

        def tolerant(value: Any) -> Any:
            try:
                return read(value) if read and value is not None else value
            except ValueError:
                return None

        return tolerant


_DELETED = text("deleted_at is not null")


class JobRow(_Table):
    """A job."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_tenant_model", "tenant", "model", "status", "number"),
        Index("ix_jobs_tenant_status", "tenant", "status", "number"),
        Index("ix_jobs_deleted_at", "deleted_at", sqlite_where=_DELETED, postgresql_where=_DELETED),
    )

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(index=True)
    model: Mapped[str] = mapped_column(index=True)
    spec: Mapped[dict[str, Any]] = mapped_column(_Kept)
    status: Mapped[str] = mapped_column(index=True)
    restarts: Mapped[int] = mapped_column("starts", default=0)
    submitted_at: Mapped[str]
    started_at: Mapped[str | None] = mapped_column(default=None)
    finished_at: Mapped[str | None] = mapped_column(default=None)
    activity: Mapped[dict[str, Any] | None] = mapped_column(_Kept, default=None)
    result: Mapped[dict[str, Any] | None] = mapped_column(_Kept, default=None)
    error: Mapped[dict[str, Any] | None] = mapped_column(_Kept, default=None)
    request_key: Mapped[str | None] = mapped_column(unique=True, default=None)
    reads_anything: Mapped[bool] = mapped_column(default=True, server_default=true())
    tenant: Mapped[str] = mapped_column(index=True, default=DEFAULT_TENANT, server_default=DEFAULT_TENANT)
    version: Mapped[int] = mapped_column(default=ROW_VERSION, server_default="1")
    deleted_at: Mapped[str | None] = mapped_column(default=None)
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    # On disks, when it was paused or over last.
    kept_bytes: Mapped[int | None] = mapped_column(BigInteger, default=None)

    def record(self) -> JobRecord:
        """The job as it is now."""
        return JobRecord(
            id=self.id,
            name=self.name,
            model=self.model,
            spec=_object(self.spec) or {},
            status=cast("Status", self.status),
            restarts=self.restarts,
            submitted_at=self.submitted_at,
            started_at=self.started_at,
            finished_at=self.finished_at,
            activity=_object(self.activity) if self.status in AT_WORK else None,
            result=_object(self.result),
            error=_object(self.error),
            reads_anything=self.reads_anything,
            tenant=self.tenant,
            version=self.version,
            priority=self.priority,
        )


def _object(value: object) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


class CountRow(_Table):
    """How many jobs of a tenant are in a state, without those that are being deleted, and how many bytes are kept of them.

    Triggers of the database keep both.
    """

    __tablename__ = "job_counts"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(primary_key=True)
    jobs: Mapped[int] = mapped_column(BigInteger)
    bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")


class LabelRow(_Table):
    """A label of a job."""

    __tablename__ = "job_labels"
    __table_args__ = (Index("ix_job_labels_name_value", "name", "value"),)

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class TurnRow(_Table):
    """When a tenant had its last turn: the number of that turn, counted over all tenants."""

    __tablename__ = "tenant_turns"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    turn: Mapped[int] = mapped_column(BigInteger)


class EventRow(_Table):
    """An event of a job. Its ``key`` is written once."""

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("job", "key"),)

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    key: Mapped[str]
    kind: Mapped[str]
    at: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(JSON)


class AliasRow(_Table):
    """A name that stands for models. The newest of its ``targets`` come last; those before can be gone back to.

    The name is ``<tenant>/<name>``, but of the default tenant ``<name>`` alone.
    """

    __tablename__ = "aliases"

    name: Mapped[str] = mapped_column(primary_key=True)
    targets: Mapped[list[dict[str, float]]] = mapped_column(JSON)


class KeyRow(_Table):
    """An API key, without its secret."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    hash: Mapped[str]
    owner: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    scopes: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[str]
    expires_at: Mapped[str | None] = mapped_column(default=None)
    revoked_at: Mapped[str | None] = mapped_column(default=None)
    used_at: Mapped[str | None] = mapped_column(default=None)
    requests_per_minute: Mapped[int | None] = mapped_column(default=None)


class SiteRow(_Table):
    """A site that has joined. ``session`` is its newest process, or None once that has left. ``seen_at`` is a Unix time."""

    __tablename__ = "sites"

    name: Mapped[str] = mapped_column(primary_key=True)
    session: Mapped[str | None]
    version: Mapped[str]
    seen_at: Mapped[float]


class SiteOrderRow(_Table):
    """An order for a site, and its answer. ``document`` and ``answer`` are JSON; ``session`` is the process that has taken it.

    ``worked`` are the seconds that the process has said it worked, and ``doing`` what it does.
    """

    __tablename__ = "site_orders"
    __table_args__ = (UniqueConstraint("site", "order"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    order: Mapped[str] = mapped_column(index=True)
    site: Mapped[str] = mapped_column(index=True)
    job: Mapped[str] = mapped_column(index=True)
    document: Mapped[str]
    tensors: Mapped[str | None]
    most_bytes: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(default="waiting")
    session: Mapped[str | None] = mapped_column(default=None)
    answer: Mapped[str | None] = mapped_column(default=None)
    doing: Mapped[str | None] = mapped_column(default=None)
    worked: Mapped[float] = mapped_column(default=0.0)


class UploadRow(_Table):
    """A file that was sent to the service, or a part of it. ``complete`` says that all of it is there, and was checked."""

    __tablename__ = "uploads"
    __table_args__ = (UniqueConstraint("tenant", "name", "sha256"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    tenant: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    complete: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[str]


class AnswerRow(_Table):
    """A request with an ``Idempotency-Key``, and its answer once it has one.

    ``digest`` is of the request. ``holder`` carries it out, and is believed dead after ``held_until``, a Unix time.
    """

    __tablename__ = "answers"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]
    holder: Mapped[str]
    held_until: Mapped[float]
    at: Mapped[str] = mapped_column(index=True)
    status: Mapped[int | None] = mapped_column(default=None)
    headers: Mapped[list[list[str]] | None] = mapped_column(JSON, default=None)
    body: Mapped[str | None] = mapped_column(default=None)


class AuditRow(_Table):
    """An entry of the audit log. The database lets nobody change or delete one."""

    __tablename__ = "audit"

    number: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    at: Mapped[str]
    tenant: Mapped[str | None]
    key: Mapped[str | None]
    action: Mapped[str]
    target: Mapped[str]
    address: Mapped[str]
    outcome: Mapped[str]
    request: Mapped[str | None]


class SchemaRow(_Table):
    """A mark that tells code from before Alembic that the tables are of a later version."""

    __tablename__ = "schema"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


TABLES = _Table.metadata
"""All of them, for Alembic."""


def moment(at: datetime | None = None) -> str:
    """A time, by default now, as the tables have it: ISO 8601 in UTC, to the millisecond. Later times are greater texts."""
    return (at or datetime.now(UTC)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
