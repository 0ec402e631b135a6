"""Routes of jobs: forecast, submit, list and show."""

from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from chainfed_ray.api.jobs.etags import IfNoneMatch, is_known
from chainfed_ray.api.jobs.from_records import came_late, full, page_of
from chainfed_ray.api.report.pictures import check_drawing
from chainfed_ray.api.rest.job_file import BODY, StrictRoute, SubmittedJob
from chainfed_ray.api.rest.service import Caller, Jobs, WithService, while_connected
from chainfed_ray.api.schemas.jobs import ClientPage, JobPage, JobResource
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.pages import Place
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.records.states import Status
from chainfed_ray.spec.job import JobSpec

router = APIRouter(prefix="/v1", tags=["jobs"], route_class=StrictRoute)

_PNG = "image/png"
_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {_PNG: {"schema": {"type": "string", "format": "binary"}}}}
}


_LABEL = r"^[a-z0-9-]{1,63}=[^\x00]{0,63}$"
_ETAG = {
    "ETag": {
        "description": 'of this answer: `"<revision>-<digest>"`, of the job\'s state and of the bytes of the answer',
        "schema": {"type": "string"},
    }
}
_TAGGED: dict[int | str, dict[str, Any]] = {
    200: {"headers": _ETAG},
    304: {"description": "The job is as it was when the answer had this `ETag`", "headers": _ETAG},
}
IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern="^[ -~]{1,200}$",
        description="1 to 200 printable ASCII characters; a repeated key returns the same job, so that a retry is safe",
    ),
]


async def _accept(
    request: Request,
    response: Response,
    service: WithService,
    caller: Caller,
    idempotency_key: IdempotencyKey = None,
) -> Callable[[JobSpec, JobStore], Awaitable[JobResource]]:
    async def accept(spec: JobSpec, jobs: JobStore) -> JobResource:
        service.check_fits(spec.document(), caller)
        # Before the check, which takes seconds. ``submit`` looks again: others of the tenant's jobs may end meanwhile.
        await run_in_threadpool(service.check_kept, caller)
        await while_connected(request, service.check(spec, caller.reads_anything, caller.tenant))
        most_queued, most_stored = service.queue_of(caller), service.bytes_of(caller)
        record = await run_in_threadpool(
            jobs.submit, spec, idempotency_key, caller.reads_anything, most_queued, most_stored
        )
        response.headers["Location"] = f"/v1/jobs/{record.id}"
        return await run_in_threadpool(full, jobs, record)

    return accept


Accept = Annotated[Callable[[JobSpec, JobStore], Awaitable[JobResource]], Depends(_accept)]
"""Checks a job of the caller, queues it, and names its place in the response. A repeated key queues it once.

Raises:
    InvalidJob: the job cannot run.
    JobConflict: the key was used for another job.
    LimitReached: the caller's tenant has as many jobs in the queue, or as many bytes, as it may.
"""


@router.post("/plan", response_model=Forecast, openapi_extra=BODY, responses=_PICTURE)
async def plan_job(spec: SubmittedJob, request: Request, service: WithService, caller: Caller) -> Forecast | Response:
    """Forecast a job without training it: which clients join, memory, network, time, and what one change would gain."""
    with_picture = _PNG in request.headers.get("accept", "")
    if with_picture:
        check_drawing()
    forecast = await while_connected(request, service.plan(spec, caller.reads_anything, caller.tenant))
    if with_picture:
        from chainfed_ray.api.report.forecast_picture import png  # imports matplotlib, which is an optional extra

        return Response(await run_in_threadpool(png, forecast), media_type=_PNG)
    return forecast


@router.post("/jobs", status_code=201, openapi_extra=BODY)
async def submit_job(spec: SubmittedJob, jobs: Jobs, accept: Accept) -> JobResource:
    """Check a job and queue it. A job that cannot run is refused with every field that is wrong."""
    return await accept(spec, jobs)


@router.get("/jobs", response_model=JobPage)
def list_jobs(
    jobs: Jobs,
    limit: Annotated[int, Query(ge=1, le=1000, description="the most jobs of a page")] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next` of the page before")] = None,
    state: Annotated[
        list[Status] | None, Query(max_length=20, description="return only jobs in one of these states")
    ] = None,
    label: Annotated[
        list[Annotated[str, Field(pattern=_LABEL)]] | None,
        Query(max_length=32, description="return only jobs with each of these labels, such as `team=search`"),
    ] = None,
    status: Annotated[Status | None, Query(deprecated=True, description="the same as one `state`")] = None,
) -> Response:
    """The jobs, the newest first."""
    place = None if cursor is None else Place.parse(cursor)
    states = [*(state or ()), *([status] if status else ())]
    labels = [(name, value) for name, _, value in (text.partition("=") for text in label or ())]
    lines = jobs.lines(limit + 1, place, states or None, labels)
    shown = lines[:limit]
    page = page_of(shown, Place.after(shown[-1]).cursor() if len(lines) > limit else None)
    return Response(page.model_dump_json(), media_type="application/json")


@router.get("/jobs/{job}", response_model=JobResource, responses=_TAGGED)
def get_job(job: str, jobs: Jobs, if_none_match: IfNoneMatch = None) -> Response:
    """A job, with its progress and, once it is over, its result or its error."""
    revision = jobs.revision(job)  # first: of a job that changes meanwhile, the tag is older than what is shown
    body = full(jobs, jobs.get(job)).model_dump_json().encode()
    tag = f'"{revision}-{blake2b(body, digest_size=16).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if is_known(tag, if_none_match):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.get("/jobs/{job}/clients")
def list_clients(
    job: str,
    jobs: Jobs,
    service: WithService,
    after: Annotated[int, Query(ge=0, lt=2**31, description="leave out so many clients at the beginning")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="the most clients of a page")] = 100,
) -> ClientPage:
    """The clients of a job's fleet, each with its plan or what it lacks. There are none before the job has started.

    Those of sites that came after the job had begun are the last, in the order in which their sites came.
    """
    record = jobs.get(job)
    found = service.clients(record.id, after, limit + 1, came_late(jobs, record.id))
    return ClientPage(clients=found[:limit], next=after + limit if len(found) > limit else None)
