"""Routes that tell a job what to do: pause, go on, end, be tried again, with changes, be deleted."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool

from chainfed_ray.api.jobs.etags import JobsAsSeen
from chainfed_ray.api.jobs.from_records import full
from chainfed_ray.api.jobs.merge_patch import BODY, Patch, patched
from chainfed_ray.api.jobs.routes import Accept
from chainfed_ray.api.rest.job_file import StrictRoute
from chainfed_ray.api.rest.service import Caller, WithService
from chainfed_ray.api.schemas.jobs import JobResource
from chainfed_ray.cluster.jobs import control
from chainfed_ray.errors import InvalidJob
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job

router = APIRouter(prefix="/v1/jobs/{job}", tags=["jobs"], route_class=StrictRoute)


@router.post("/pause", status_code=202)
def pause_job(job: str, jobs: JobsAsSeen) -> JobResource:
    """Pause a job. One that runs is `pausing` until its present round is committed; then its processes end."""
    return full(jobs, control.pause(jobs, job))


@router.post("/resume", status_code=202)
def resume_job(job: str, jobs: JobsAsSeen, service: WithService, caller: Caller) -> JobResource:
    """Let a paused job go on from its last commit, with the same result as if it had not paused. It waits in the queue."""
    most_queued, most_stored = service.queue_of(caller), service.bytes_of(caller)
    check_fits = partial(service.check_fits, caller=caller)
    return full(jobs, control.resume(jobs, job, check_fits, most_queued, most_stored))


@router.post("/cancel", status_code=202)
def cancel_job(job: str, jobs: JobsAsSeen) -> JobResource:
    """Cancel a job. Its finished rounds are kept; a running job is `cancelling` until its processes have ended."""
    return full(jobs, control.cancel(jobs, job))


@router.post("/retry", status_code=202)
def retry_job(job: str, jobs: JobsAsSeen, service: WithService, caller: Caller) -> JobResource:
    """Try a job again that failed or was cancelled. It goes on from its last finished round, and waits in the queue."""
    most_queued, most_stored = service.queue_of(caller), service.bytes_of(caller)
    check_fits = partial(service.check_fits, caller=caller)
    return full(jobs, control.retry(jobs, job, check_fits, most_queued, most_stored, service.folder_of))


@router.post("/clone", status_code=201, openapi_extra=BODY)
async def clone_job(job: str, patch: Patch, jobs: JobsAsSeen, accept: Accept) -> JobResource:
    """Queue a new job with the document of this one, and changes. It is checked as every job is, and begins anew."""
    record = await run_in_threadpool(jobs.get, job)
    spec = await run_in_threadpool(_changed, record.spec, patch)
    return await accept(spec, jobs)


@router.delete("", status_code=204, response_class=Response)
def delete_job(job: str, jobs: JobsAsSeen) -> None:
    """Delete a job that is over, with its events, its files and its model. One whose model an alias names is kept."""
    control.delete(jobs, job)


def _changed(document: dict[str, Any], patch: dict[str, Any]) -> JobSpec:
    try:
        return parse_job(patched(document, patch))
    except RecursionError:  # JSON is read to about the depth to which Python calls functions
        raise InvalidJob.at("(patch)", "…", "an object of fewer levels") from None
