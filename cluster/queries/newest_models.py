"""The newest trained model of each name: every request to a model asks for it, so its job's documents are read once."""

from functools import lru_cache

from sqlalchemy import bindparam, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from chainfed_ray.cluster.tables import JobRecord, JobRow

_MOST_JOBS = 256  # that are remembered

# Made once: to make a question takes longer than to answer it.
_NEWEST = (
    select(JobRow.id)
    .where(
        JobRow.tenant == bindparam("tenant"),
        JobRow.model == bindparam("model"),
        JobRow.status == "succeeded",
        JobRow.started_at.is_not(None),
        JobRow.deleted_at.is_(None),
    )
    .order_by(JobRow.number.desc())
    .limit(1)
)


class NewestModels:
    """The models of jobs, in the database behind ``engine``; safe to use from several threads.

    Which job is the newest is asked each time. A job that has succeeded does not change any more, so it is remembered.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._record = lru_cache(_MOST_JOBS)(self._read)

    def of(self, tenant: str | None, model: str) -> JobRecord | None:
        """The newest job of ``tenant`` that succeeded, and whose model it calls ``model``."""
        with self._engine.connect() as connection:
            job = connection.execute(_NEWEST, {"tenant": tenant, "model": model}).scalar()
        return None if job is None else self._record(job)

    def _read(self, job: str) -> JobRecord | None:
        with Session(self._engine) as session:
            row = session.scalars(select(JobRow).where(JobRow.id == job)).one_or_none()
            return row.record() if row and row.spec else None
