"""The route of a job's events: as a page, or as a stream of server-sent events that can be resumed."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from chainfed_ray.api.rest.job_file import StrictRoute
from chainfed_ray.api.rest.service import Caller, Jobs, WithService
from chainfed_ray.api.schemas.events import EventPage, EventResource
from chainfed_ray.cluster.jobs.feed import Busy, EventFeed
from chainfed_ray.cluster.tables import Event
from chainfed_ray.records.states import FINISHED

router = APIRouter(prefix="/v1/jobs/{job}/events", tags=["jobs"], route_class=StrictRoute)

_MEDIA_TYPE = "text/event-stream"


@router.get(
    "",
    response_model=EventPage,
    responses={
        200: {"content": {_MEDIA_TYPE: {"schema": {"type": "string"}}}},
        204: {"description": "The job is over, and a stream would have no events"},
    },
)
async def list_events(
    job: str,
    request: Request,
    service: WithService,
    jobs: Jobs,
    caller: Caller,
    after: Annotated[int, Query(ge=0, lt=2**31, description="return only events with a higher number than this")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="the most events of a page")] = 1000,
    last_event_id: Annotated[
        int | None, Header(ge=0, lt=2**31, description="resume a broken stream after the event with this number")
    ] = None,
) -> Response:
    """A page of events; with `Accept: text/event-stream` a stream, which ends when the job is over.

    A stream also has events of the kind `activity`, which say what the job is doing. They have no number and are not kept.
    """
    after = last_event_id if last_event_id is not None else after
    found = await run_in_threadpool(jobs.events, job, after, limit)
    over = not found and (await run_in_threadpool(jobs.get, job)).status in FINISHED
    if _MEDIA_TYPE not in request.headers.get("accept", ""):
        shown = [EventResource(seq=event.seq, kind=event.kind, at=event.at, data=event.data) for event in found]
        finished = over or (found[-1:] and found[-1].kind in FINISHED and len(found) < limit)
        page = EventPage(events=shown, last=found[-1].seq if found else after, finished=finished)
        return JSONResponse(page.model_dump())
    if over:
        return Response(status_code=204)  # the standard of server-sent events: the client must not reconnect
    service.feed.check_room(caller.tenant)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(service.feed, job, after, caller.tenant), media_type=_MEDIA_TYPE, headers=headers)


async def _stream(feed: EventFeed, job: str, after: int, tenant: str) -> AsyncIterator[bytes]:
    async with aclosing(feed.watch(job, after, tenant)) as happenings:
        async for happening in happenings:
            match happening:
                case Event():
                    yield _encoded(happening)
                case Busy():
                    data = json.dumps({"kind": "activity", "data": happening.activity})
                    yield format_sse_event(event="activity", data_str=data)
                case None:
                    yield KEEPALIVE_COMMENT  # a proxy may close a connection that stays silent


def _encoded(event: Event) -> bytes:
    data = json.dumps({"seq": event.seq, "kind": event.kind, "at": event.at, "data": event.data})
    return format_sse_event(id=str(event.seq), event=event.kind, data_str=data)
