"""Routes for the processes at sites: they join, take orders, and send answers. Each needs a site's key (docs/sites.md)."""

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi import Path as PathParameter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from chainfed_ray.api.rest.files import SentFile
from chainfed_ray.api.rest.job_file import StrictRoute
from chainfed_ray.api.rest.service import Caller, WithService
from chainfed_ray.cluster.sites.mailbox import site_address
from chainfed_ray.wire.envelope import (
    KEPT_ANSWER,
    MOST_CHARACTERS,
    PROTOCOL,
    Accepted,
    AnswerMessage,
    Asking,
    Heartbeat,
    Joining,
    Leaving,
    NextOrder,
    Received,
    Welcome,
)

router = APIRouter(prefix="/v1/site", tags=["sites"], route_class=StrictRoute)

_BINARY, _JSON = "application/octet-stream", "application/json"
_BYTES = {"schema": {"type": "string", "format": "binary"}}


def _site(caller: Caller) -> str:
    """The site whose key the request has, as the mailbox calls it."""
    if caller.site is None:
        raise HTTPException(403, "this needs the key of a site, which `chainfed sites add` makes")
    return site_address(caller.tenant, caller.site)


def _check_protocol(spoken: int) -> None:
    if spoken != PROTOCOL:
        detail = f"the site speaks version {spoken} of the protocol, and this service version {PROTOCOL}"
        raise HTTPException(426, detail)


SiteName = Annotated[str, Depends(_site)]
OrderPath = Annotated[str, PathParameter(pattern="^[0-9a-f]{32}$", description="the id of an order")]


@router.post("/session")
def join_site(body: Joining, site: SiteName, caller: Caller, service: WithService) -> Welcome:
    """Begin to take the orders of a site. An earlier process of the site is given no more, and its orders wait again."""
    _check_protocol(body.protocol)
    assert caller.site is not None, "the mailbox calls it something"
    if body.site not in (None, caller.site):  # before it ends the process that is there
        raise HTTPException(403, f"the key is that of site {caller.site}, not of {body.site}")
    service.mailbox.join(site, body.session, body.version)
    return Welcome(site=caller.site)


@router.post("/leave")
def leave_site(body: Leaving, site: SiteName, service: WithService) -> Accepted:
    """Take no more orders. Those that were taken wait for the next process of the site."""
    service.mailbox.leave(site, body.session)
    return Accepted()


@router.post("/orders/next")
async def next_order(body: Asking, site: SiteName, service: WithService) -> NextOrder:
    """The next order for the site. It is waited for. Jobs of the site that are over are told at once."""
    _check_protocol(body.protocol)
    loop = asyncio.get_running_loop()
    ends = loop.time() + body.wait
    while True:
        order = await run_in_threadpool(service.mailbox.next, site, body.session, body.running)
        over = await run_in_threadpool(service.mailbox.over, site, body.jobs) if body.jobs else ()
        left = ends - loop.time()
        if order or over or left <= 0:
            return NextOrder(order=order, over=over)
        await service.orders.wait(site, body.session, body.jobs, left)


@router.post("/orders/{order}/heartbeat")
def hear_order(order: OrderPath, body: Heartbeat, site: SiteName, service: WithService) -> Accepted:
    """Note how far an order is. 410 if it is not wanted any more."""
    service.mailbox.heartbeat(site, order, body)
    return Accepted()


@router.get(
    "/orders/{order}/document",
    response_class=FileResponse,
    responses={200: {"content": {_JSON: _BYTES}}, 206: {"content": {_JSON: _BYTES}}},
)
def get_order_document(order: OrderPath, site: SiteName, service: WithService) -> SentFile:
    """The document of an order's job, which all its orders have in common; with `Range` a part of it."""
    gone = HTTPException(410, "the job of the order is over")
    return _sent(service.mailbox.document_of(site, order), _JSON, gone)


@router.get(
    "/orders/{order}/tensors",
    response_class=FileResponse,
    responses={200: {"content": {_BINARY: _BYTES}}, 206: {"content": {_BINARY: _BYTES}}},
)
def get_order_tensors(order: OrderPath, site: SiteName, service: WithService) -> SentFile:
    """The tensors of an order, as a safetensors file; with `Range` a part of it."""
    gone = HTTPException(410, "the order has no tensors, or its job is over")
    return _sent(service.mailbox.tensors_of(site, order), _BINARY, gone)


@router.get("/orders/{order}/tensors/received")
def get_received(order: OrderPath, site: SiteName, service: WithService) -> Received:
    """How many bytes of the answer's tensors have arrived."""
    return Received(received=service.mailbox.received(site, order))


@router.put(
    "/orders/{order}/tensors",
    openapi_extra={"requestBody": {"required": True, "content": {_BINARY: _BYTES}}},
)
async def put_answer_tensors(
    order: OrderPath,
    request: Request,
    site: SiteName,
    service: WithService,
    session: Annotated[str, Query(pattern="^[0-9a-f]{32}$", description="the process at the site")],
    offset: Annotated[int, Query(ge=0, lt=2**50, description="how many bytes come before this piece")],
) -> Received:
    """Send a piece of the answer's tensors. A piece that is not the next one is not kept; the answer says what has arrived."""
    piece = await request.body()
    return Received(received=await run_in_threadpool(service.mailbox.receive, site, order, session, offset, piece))


@router.post("/orders/{order}/answer")
def answer_order(order: OrderPath, body: AnswerMessage, site: SiteName, service: WithService) -> Accepted:
    """Answer an order. The same answer may be sent again: it counts once."""
    try:
        text = body.answer.model_dump_json()
        KEPT_ANSWER.validate_json(text)  # as it will be read again
    except ValueError as error:  # such as half a surrogate pair, or JSON nested too deep to be read
        raise HTTPException(422, f"the answer cannot be kept ({type(error).__name__})") from None
    if len(text) > MOST_CHARACTERS:
        raise HTTPException(413, f"the answer has more than {MOST_CHARACTERS} characters")
    service.mailbox.answer(site, order, body.session, body.answer)
    return Accepted()


def _sent(file: Path | None, media_type: str, gone: HTTPException) -> SentFile:
    if file is None:
        raise gone
    try:
        return SentFile(file, media_type, gone)
    except FileNotFoundError:
        raise gone from None
