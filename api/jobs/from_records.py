"""Jobs as the API shows them, from what the database and the records have of them."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta

from pydantic import ValidationError

from chainfed_ray.activity import Activity
from chainfed_ray.api.jobs.conditions import CHANGES, conditions
from chainfed_ray.api.schemas.jobs import JobPage, JobProgress, JobResource
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.lines import JobLine
from chainfed_ray.cluster.tables import Event, JobRecord, moment
from chainfed_ray.records.fleet import FleetClient, LateSite, late_clients
from chainfed_ray.records.rounds import JobStarted, Round

_TIMED_ROUNDS = 5  # the newest ones, whose time tells how long others take


def full(jobs: JobStore, record: JobRecord) -> JobResource:
    """The job in ``record`` with its conditions and progress, for which its events are read.

    One whose records are of an earlier version has no progress.
    """
    told = jobs.of_kind(record.id, *CHANGES, "late_site")
    changes = [event for event in told if event.kind in CHANGES]
    job_started, newest = jobs.newest(record.id, "started"), jobs.newest_of(record.id, "round", _TIMED_ROUNDS)
    if job_started is None:
        return _resource(record, changes)
    try:
        last = Round.model_validate(newest[0].data) if newest else None
        late = (LateSite.model_validate(event.data) for event in told if event.kind == "late_site")
        fleet = JobStarted.model_validate(job_started.data).with_late(late)
    except ValidationError:
        return _resource(record, changes)
    progress = JobProgress.of(fleet, last, record.status == "succeeded")
    ends = _ends(changes[-1], newest, progress) if record.status == "running" and newest and changes else None
    return _resource(record, changes, progress, ends)


def page_of(lines: Iterable[JobLine], following: str | None) -> JobPage:
    """The page with these ``lines``, before that at the cursor ``following``. All are checked at once, in less time."""
    return JobPage.model_validate({"jobs": [line._asdict() for line in lines], "next": following})


def came_late(jobs: JobStore, job: str) -> Iterator[FleetClient]:
    """The clients of sites that came after the job had begun. The database is asked when the first is looked at."""
    told = jobs.of_kind(job, "started", "late_site")
    plans = sum(len(JobStarted.model_validate(event.data).admitted) for event in told if event.kind == "started")
    yield from late_clients(plans, (LateSite.model_validate(event.data) for event in told if event.kind == "late_site"))


def _resource(
    record: JobRecord,
    changes: Sequence[Event],
    progress: JobProgress | None = None,
    estimated_finish: str | None = None,
) -> JobResource:
    """The job in ``record`` after the ``changes`` of its state, with its progress."""
    return JobResource(
        id=record.id,
        name=record.name,
        tenant=record.tenant,
        status=record.status,
        model=record.model,
        submitted_at=record.submitted_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        accuracy=(record.result or {}).get("accuracy"),
        labels=record.spec.get("labels") or {},
        priority=record.priority,
        activity=Activity.model_validate(record.activity) if record.activity else None,
        progress=progress,
        estimated_finish=estimated_finish,
        conditions=conditions(changes),
        result=record.result,
        error=record.error,
        spec=record.spec,
    )


def _ends(change: Event, newest: Sequence[Event], progress: JobProgress) -> str | None:
    """When a job ends whose remaining rounds take as long as the ``newest``. It follows from events, not from the clock.

    None if that is beyond the last year that a date can have.
    """
    seconds = sum(event.data["seconds"] for event in newest) / len(newest)
    since = datetime.fromisoformat(max(change.at, newest[0].at))
    try:
        return moment(since + timedelta(seconds=seconds * (progress.total_rounds - progress.round)))
    except OverflowError:
        return None
