"""The route of a job's log: what its coordinator and its clients did, in pages, or waited for."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query
from fastapi.concurrency import run_in_threadpool

from chainfed_ray.api.rest.job_file import StrictRoute
from chainfed_ray.api.rest.service import Caller, Jobs, WithService
from chainfed_ray.api.schemas.events import LogPage
from chainfed_ray.cluster.files.job_log import LOG, page_of
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.tables import JobRecord
from chainfed_ray.records.states import FINISHED

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=StrictRoute)

LOOK_SECONDS = 0.5  # between two looks whether there are further lines
_STATE_LOOKS = 6  # looks between two questions to the database, whether the job is over


@router.get("/{job}/logs")
async def get_logs(
    job: str,
    jobs: Jobs,
    service: WithService,
    caller: Caller,
    after: Annotated[int, Query(ge=0, lt=2**53, description="where to begin: `next` of the page before")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="the most lines of a page")] = 1000,
    wait: Annotated[float, Query(ge=0, le=25, description="wait so many seconds for a line, if there is none yet")] = 0,
) -> LogPage:
    """The log of a job, which has no row of data. To follow a job, ask again and again with `after` and `wait`."""
    record = await run_in_threadpool(jobs.get, job)
    if service.folder_of is None:
        raise HTTPException(404, "this service keeps no logs")
    folder = await run_in_threadpool(service.folder_of, record.id)
    found = await _page(folder, record, after, limit)
    if found.lines or found.finished or not wait:
        return found
    with service.log_readers.one_more(caller.tenant):
        return await _awaited(jobs, service.folder_of, record, folder, after, limit, wait)


async def _awaited(
    jobs: JobStore,
    folder_of: Callable[[str], Path],
    record: JobRecord,
    folder: Path,
    after: int,
    limit: int,
    wait: float,
) -> LogPage:
    """The page once it has a line or the job is over, or after ``wait`` seconds.

    With an object store, the folder is another one after each of the job's commits.
    """
    loop, looks = asyncio.get_running_loop(), 0
    ends = loop.time() + wait
    while True:
        await asyncio.sleep(min(LOOK_SECONDS, max(ends - loop.time(), 0)))
        looks += 1
        if looks % _STATE_LOOKS == 0:
            record = await run_in_threadpool(jobs.get, record.id)
            folder = await run_in_threadpool(folder_of, record.id)
        found = await _page(folder, record, after, limit)
        if found.lines or found.finished or loop.time() >= ends:
            return found


async def _page(folder: Path, record: JobRecord, after: int, limit: int) -> LogPage:
    """The page as it is. ``record`` was read before ``folder`` was: no line comes after that of a job that is over."""
    lines, following = await run_in_threadpool(page_of, folder / LOG, after, limit)
    return LogPage(lines=lines, next=following, finished=record.status in FINISHED and len(lines) < limit)
