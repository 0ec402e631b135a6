"""Jobs as a list shows them: the columns that it needs, and not the documents of the jobs."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, cast

from sqlalchemy import JSON, ColumnElement, Integer, Select, bindparam, case, func, select, type_coerce
from sqlalchemy.engine import Engine

from chainfed_ray.cluster.tables import JobRow, LabelRow
from chainfed_ray.cluster.tenants import View
from chainfed_ray.records.states import Status

_COLUMNS = (
    JobRow.id,
    JobRow.name,
    JobRow.tenant,
    JobRow.status,
    JobRow.model,
    JobRow.submitted_at,
    JobRow.started_at,
    JobRow.finished_at,
    JobRow.priority,
)


class JobLine(NamedTuple):
    """A job in a list. See ``JobRecord``. ``accuracy`` is that of its result, once it has one."""

    id: str
    name: str
    tenant: str
    status: Status
    model: str
    submitted_at: str
    started_at: str | None
    finished_at: str | None
    priority: int
    accuracy: float | None
    labels: dict[str, str]


def newest_lines(engine: Engine, view: View, limit: int) -> list[JobLine]:
    """The lines of at most ``limit`` jobs that the ``view`` sees, the newest first."""
    question = _newest(engine.dialect.name, view.everything)
    with engine.connect() as connection:
        return _lines(view, connection.execute(question, {"most": limit, "tenant": view.tenant}))


def lines_of(engine: Engine, view: View, jobs: Select[JobRow]) -> list[JobLine]:
    """The lines of ``jobs``, which are in the order of their numbers, with the names of models as the ``view`` has them."""
    with engine.connect() as connection:
        return _lines(view, connection.execute(_question(jobs, engine.dialect.name)))


@lru_cache
def _newest(dialect: str, everything: bool) -> Select[Any]:
    """The question of ``newest_lines``. It is made once: to make it takes longer than to answer it."""
    jobs = select(JobRow).where(JobRow.deleted_at.is_(None))
    if not everything:
        jobs = jobs.where(JobRow.tenant == bindparam("tenant"))
    return _question(jobs.order_by(JobRow.number.desc()).limit(bindparam("most", type_=Integer)), dialect)


def _question(jobs: Select[JobRow], dialect: str) -> Select[Any]:
    """A row for each label of each of ``jobs``, and one for a job that has none."""
    page = jobs.with_only_columns(*_COLUMNS, _accuracy(dialect).label("accuracy"), JobRow.number).subquery()
    labelled = select(page, LabelRow.name.label("label"), LabelRow.value)
    return labelled.outerjoin(LabelRow, LabelRow.job == page.c.id).order_by(page.c.number.desc(), LabelRow.name)


def _accuracy(dialect: str) -> ColumnElement[Any]:
    """The accuracy in a job's result, of which the rest is not read. SQLite raises an error for a document that is broken."""
    found = type_coerce(JobRow.result, JSON)["accuracy"].as_float()
    return case((func.json_valid(JobRow.result) == 1, found)) if dialect == "sqlite" else found


def _lines(view: View, rows: Iterable[Any]) -> list[JobLine]:
    found: list[JobLine] = []
    for job, name, tenant, status, model, submitted, started, finished, priority, accuracy, _, label, value in rows:
        if not found or found[-1].id != job:
            served, state = view.name(tenant, model), cast("Status", status)
            line = JobLine(job, name, tenant, state, served, submitted, started, finished, priority, accuracy, {})
            found.append(line)
        if label is not None:
            found[-1].labels[label] = value
    return found
