"""Routes that tell a job what to do: pause, go on, end."""

from fastapi import APIRouter

from chainfed_ray.api.jobs.resources import JobResource, full
from chainfed_ray.api.rest.service import Caller, Jobs, WithService
from chainfed_ray.cluster.jobs import control

router = APIRouter(prefix="/v1/jobs/{job}", tags=["jobs"])


@router.post("/pause", status_code=202)
def pause_job(job: str, jobs: Jobs) -> JobResource:
    """Pause a job. One that runs is `pausing` until its present round is committed; then its processes end."""
    return full(jobs, control.pause(jobs, job))


@router.post("/resume", status_code=202)
def resume_job(job: str, jobs: Jobs, service: WithService, caller: Caller) -> JobResource:
    """Let a paused job go on from its last commit, with the same result as if it had not paused. It waits in the queue."""
    return full(jobs, control.resume(jobs, job, service.most_queued if caller.key else None))


@router.post("/cancel", status_code=202)
def cancel_job(job: str, jobs: Jobs) -> JobResource:
    """Cancel a job. Its finished rounds are kept; a running job is `cancelling` until its processes have ended."""
    return full(jobs, control.cancel(jobs, job))
