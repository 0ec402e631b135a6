"""Jobs as a list shows them: the columns that it needs, and not the documents of the jobs."""

from collections import defaultdict
from typing import Any, NamedTuple, cast

from sqlalchemy import Select, bindparam, select
from sqlalchemy.engine import Engine

from chainfed_ray.cluster.tables import JobRow, LabelRow, Status
from chainfed_ray.cluster.tenants import View

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
    JobRow.result,
)


# Made once: to make a question takes longer than to answer it.
_LABELS = (
    select(LabelRow.job, LabelRow.name, LabelRow.value)
    .where(LabelRow.job.in_(bindparam("jobs", expanding=True)))
    .order_by(LabelRow.name)
)


class JobLine(NamedTuple):
    """A job in a list. See ``JobRecord``."""

    id: str
    name: str
    tenant: str
    status: Status
    model: str
    submitted_at: str
    started_at: str | None
    finished_at: str | None
    priority: int
    result: dict[str, Any] | None
    labels: dict[str, str]


def lines_of(engine: Engine, view: View, jobs: Select[JobRow]) -> list[JobLine]:
    """The lines of ``jobs``, with the names of models as the ``view`` has them."""
    with engine.connect() as connection:
        found = connection.execute(jobs.with_only_columns(*_COLUMNS)).all()
        labels: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for job, name, value in connection.execute(_LABELS, {"jobs": [row[0] for row in found]}):
            labels[job][name] = value
    return [
        JobLine(
            job,
            name,
            tenant,
            cast("Status", status),
            view.name(tenant, model),
            submitted_at,
            started_at,
            finished_at,
            priority,
            result if isinstance(result, dict) else None,
            labels[job],
        )
        for job, name, tenant, status, model, submitted_at, started_at, finished_at, priority, result in found
    ]
