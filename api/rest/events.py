"""What happened to a job, as a page or as a stream of server-sent events that goes on where it was broken off."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from chainfed_ray.api.rest.schemas import EventPage, EventResource
from chainfed_ray.api.rest.service import WithService
from chainfed_ray.cluster.jobs.store import FINISHED, Event, JobStore

router = APIRouter(prefix="/v1/jobs/{job}/events", tags=["jobs"])

_MEDIA_TYPE = "text/event-stream"
_LOOK_SECONDS = 0.5
_LOOKS_PER_KEEPALIVE = 30


@router.get("", response_model=EventPage, responses={200: {"content": {_MEDIA_TYPE: {}}}})
async def events(
    job: str,
    request: Request,
    service: WithService,
    after: Annotated[int, Query(ge=0, description="the number of an event; later ones follow")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="of a page")] = 1000,
    last_event_id: Annotated[int | None, Header(ge=0, description="where a stream was broken off")] = None,
) -> Response:
    """A page of events; with `Accept: text/event-stream` a stream, which ends with the job.

    A stream also tells what the job is busy with, by events of the kind `activity`: without a number, and never again.
    """
    after = last_event_id if last_event_id is not None else after
    found = await run_in_threadpool(service.store.events, job, after, limit)
    over = not found and (await run_in_threadpool(service.store.get, job)).status in FINISHED
    if _MEDIA_TYPE not in request.headers.get("accept", ""):
        shown = [EventResource(seq=event.seq, kind=event.kind, at=event.at, data=event.data) for event in found]
        finished = over or any(event.kind in FINISHED for event in found)
        page = EventPage(events=shown, last=found[-1].seq if found else after, finished=finished)
        return JSONResponse(page.model_dump())
    if over:
        return Response(status_code=204)  # by the standard, this tells a browser not to connect again
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(service.store, job, after), media_type=_MEDIA_TYPE, headers=headers)


async def _stream(store: JobStore, job: str, after: int) -> AsyncIterator[bytes]:
    looks, told = 0, None
    while True:
        found = await run_in_threadpool(store.events, job, after)
        for event in found:
            yield _wire(event)
            if event.kind in FINISHED:
                return
            after = event.seq
        activity = await run_in_threadpool(store.activity, job)
        if activity is not None and activity != told:
            yield format_sse_event(event="activity", data_str=json.dumps({"kind": "activity", "data": activity}))
        told = activity
        if found:
            looks = 0
            continue
        looks += 1
        if looks % _LOOKS_PER_KEEPALIVE == 0:
            yield KEEPALIVE_COMMENT  # so that no proxy between takes the silence for death
        await asyncio.sleep(_LOOK_SECONDS)


def _wire(event: Event) -> bytes:
    data = json.dumps({"seq": event.seq, "kind": event.kind, "at": event.at, "data": event.data})
    return format_sse_event(id=str(event.seq), event=event.kind, data_str=data)
