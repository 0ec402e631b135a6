"""Routes of jobs: submit, list, show and cancel."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.concurrency import run_in_threadpool

from chainfed_ray.api.rest.job_file import BODY, SubmittedJob
from chainfed_ray.api.rest.schemas import JobPage, JobProgress, JobResource, JobStatus, JobSummary
from chainfed_ray.api.rest.service import WithService
from chainfed_ray.cluster.jobs.store import JobRecord, JobStore
from chainfed_ray.errors import JobConflict
from chainfed_ray.records.rounds import JobStarted, Round

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

IdempotencyKey = Annotated[
    str | None, Header(max_length=200, description="a repeated key returns the same job, so that a retry is safe")
]


@router.post("", status_code=201, openapi_extra=BODY)
async def submit(
    spec: SubmittedJob, response: Response, service: WithService, idempotency_key: IdempotencyKey = None
) -> JobResource:
    """Check a job and queue it. A job that cannot run is refused with every field that is wrong."""
    await service.check(spec)
    record = await run_in_threadpool(service.store.submit, spec, idempotency_key)
    response.headers["Location"] = f"/v1/jobs/{record.id}"
    return JobResource.full(record, None)


@router.get("")
def page(
    service: WithService,
    limit: Annotated[int, Query(ge=1, le=1000, description="the most jobs of a page")] = 50,
    before: Annotated[str | None, Query(description="return only jobs older than the job with this id")] = None,
    status: Annotated[JobStatus | None, Query(description="return only jobs in this state")] = None,
) -> JobPage:
    """The jobs, the newest first."""
    records = service.store.page(limit + 1, before, status)
    shown = records[:limit]
    return JobPage(
        jobs=[JobSummary.of(record) for record in shown], next=shown[-1].id if len(records) > limit else None
    )


@router.get("/{job}")
def get(job: str, service: WithService) -> JobResource:
    """A job, with its progress and, once it is over, its result or its error."""
    return _full(service.store, service.store.get(job))


@router.post("/{job}/cancel", status_code=202)
def cancel(job: str, service: WithService) -> JobResource:
    """Cancel a job. Its finished rounds are kept; a running job is `cancelling` until its processes have ended."""
    store = service.store
    # The job may start between the two calls. Then the first move fails, and the one to `cancelling` succeeds.
    if store.get(job).status == "queued" and store.move(job, "cancelled"):
        return _full(store, store.get(job))
    store.move(job, "cancelling")
    record = store.get(job)
    if record.status in ("succeeded", "failed"):
        raise JobConflict(job, record.status, "be cancelled")
    return _full(store, record)


def _full(store: JobStore, record: JobRecord) -> JobResource:
    job_started, newest = store.newest(record.id, "started"), store.newest(record.id, "round")
    if job_started is None:
        return JobResource.full(record, None)
    progress = JobProgress.of(
        JobStarted.model_validate(job_started.data), Round.model_validate(newest.data) if newest else None
    )
    return JobResource.full(record, progress)
