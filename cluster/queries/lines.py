"""Jobs as a list shows them: the columns that it needs, and not the documents of the jobs."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Select, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

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


@dataclass(frozen=True)
class JobLine:
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
    with Session(engine) as session:
        found = session.execute(jobs.with_only_columns(*_COLUMNS)).all()
        labels: defaultdict[str, dict[str, str]] = defaultdict(dict)
        wanted = select(LabelRow.job, LabelRow.name, LabelRow.value).where(LabelRow.job.in_([row.id for row in found]))
        for job, name, value in session.execute(wanted.order_by(LabelRow.name)):
            labels[job][name] = value
    return [
        JobLine(
            id=row.id,
            name=row.name,
            tenant=row.tenant,
            status=cast("Status", row.status),
            model=view.name(row.tenant, row.model),
            submitted_at=row.submitted_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            priority=row.priority,
            result=row.result if isinstance(row.result, dict) else None,
            labels=labels[row.id],
        )
        for row in found
    ]
