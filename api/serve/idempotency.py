"""Answers a request that was sent before with the answer that it got then."""

import asyncio
import logging
import re
from contextlib import suppress
from hashlib import sha256
from http import HTTPStatus
from uuid import uuid4

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chainfed_ray.api.rest.errors import http_problem, no_database, problem
from chainfed_ray.api.schemas.problems import FieldProblem
from chainfed_ray.api.serve.scopes import KEYED, RouteNames
from chainfed_ray.cluster.access.first_answers import HELD_SECONDS, Claim, FirstAnswer, FirstAnswers
from chainfed_ray.cluster.access.identity import WITHOUT_KEYS
from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.problem import Problem

HEADER = "idempotency-key"
KEY_PATTERN = "^[ -~]{1,200}$"
REPLAYED = "idempotency-replayed"
_OWN = (b"content-length", b"date", b"x-request-id")  # headers of each answer's own
_MOST_CHARACTERS = 2**20  # of an answer that is kept
_LOOK_SECONDS = 0.2  # between two looks whether another process has the answer
_WAIT_SECONDS = 150.0  # as long as the client of ours waits
_NOT_KEPT = "the answer to a request with an Idempotency-Key was not kept (%s)"
_log = logging.getLogger(__name__)


class Idempotency:
    """Middleware for requests that make something and have an ``Idempotency-Key``.

    The first one is carried out. The same request again gets its answer, in any process of the service, if it was a success: a
    refusal has made nothing, so the request may be changed. Of twins that come together one waits for the other. Another
    request with the key is refused. Keys are a tenant's own. An answer whose ``Location`` is no longer there is forgotten.
    """

    def __init__(self, app: ASGIApp, answers: FirstAnswers, routes: RouteNames) -> None:
        self._app, self._answers, self._routes = app, answers, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""
        if scope["type"] != "http" or scope["method"] != "POST" or self._routes.of(scope) not in KEYED:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        keys = request.headers.getlist(HEADER)
        if not keys:
            await self._app(scope, receive, send)
            return
        if len(keys) > 1 or not re.fullmatch(KEY_PATTERN, keys[0]):
            await _invalid(request, ", ".join(keys))(scope, receive, send)
            return
        try:
            body = await _body(receive)
        except HTTPException as error:  # of the limits of a body
            await http_problem(request, error)(scope, receive, send)
            return
        if body is not None:
            await self._handle(request, keys[0], body, receive, send)

    async def _handle(self, request: Request, key: str, body: bytes, receive: Receive, send: Send) -> None:
        tenant = getattr(request.state, "identity", WITHOUT_KEYS).tenant
        digest = sha256(f"{request.method} {request.url.path}?{request.url.query}\n".encode() + body).hexdigest()
        held = _Held(self._answers, tenant, key, uuid4().hex)
        try:
            while isinstance(found := await held.claim(digest), FirstAnswer) and await self._is_gone(request, found):
                await held.forget(found)
        except NO_ANSWER as error:
            await no_database(request, error)(request.scope, receive, send)
            return
        match found:
            case FirstAnswer():
                await _again(found)(request.scope, receive, send)
            case Claim.OURS:
                await self._carry_out(request, held, body, receive, send)
            case _:
                detail = "the Idempotency-Key was used for another request; a new request needs a new key"
                if found is Claim.ELSEWHERE:
                    detail = "the first request with this Idempotency-Key is not answered yet; send it again later"
                await problem(request, HTTPStatus.CONFLICT, "idempotency-conflict", detail)(
                    request.scope, receive, send
                )

    async def _carry_out(self, request: Request, held: "_Held", body: bytes, receive: Receive, send: Send) -> None:
        """Answer the request, and keep the answer before it is sent."""
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Message] = []

        async def receive_again() -> Message:
            return waiting.pop() if waiting else await receive()

        async def collect(message: Message) -> None:
            sent.append(message)

        renewing = asyncio.create_task(held.renew())
        kept = False
        try:
            await self._app(request.scope, receive_again, collect)
            if answer := _kept(sent):
                kept = await held.keep(answer)
        finally:
            renewing.cancel()
            if not kept:
                await held.release()
        for message in sent:
            await send(message)

    async def _is_gone(self, request: Request, answer: FirstAnswer) -> bool:
        """Whether the tenant no longer has what an answer says was made: the application says so of its ``Location``."""
        location = dict(answer.headers).get("location")
        if location is None:
            return False
        sent: list[Message] = []

        async def nothing() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def collect(message: Message) -> None:
            sent.append(message)

        look = {**request.scope, "method": "GET", "path": location, "raw_path": location.encode(), "query_string": b""}
        look |= {"headers": [(b"host", b"localhost")], "state": {**request.scope["state"]}}
        await self._app(look, nothing, collect)
        return bool(sent) and sent[0]["status"] == HTTPStatus.NOT_FOUND


class _Held:
    """A key of a tenant's, as a request that is carried out holds it."""

    def __init__(self, answers: FirstAnswers, tenant: str, key: str, holder: str) -> None:
        self._answers, self._of = answers, (tenant, key)
        self._holder = holder

    async def claim(self, digest: str) -> FirstAnswer | Claim:
        """The answer, or what is known of it; that another process has the request is waited for."""
        ends = asyncio.get_running_loop().time() + _WAIT_SECONDS
        while True:
            found = await run_in_threadpool(self._answers.claim, *self._of, digest, self._holder)
            if found is not Claim.ELSEWHERE or asyncio.get_running_loop().time() > ends:
                return found
            await asyncio.sleep(_LOOK_SECONDS)

    async def renew(self) -> None:
        """Hold the key until this is cancelled, or another process has it."""
        holds = True
        while holds:
            await asyncio.sleep(HELD_SECONDS / 3)
            with suppress(*NO_ANSWER):
                holds = await run_in_threadpool(self._answers.renew, *self._of, self._holder)

    async def keep(self, answer: FirstAnswer) -> bool:
        """Whether the answer was kept. What was made stays made if it was not, and the key is free after half a minute."""
        try:
            kept = await run_in_threadpool(self._answers.keep, *self._of, self._holder, answer)
        except NO_ANSWER as error:
            _log.warning(_NOT_KEPT, type(error).__name__)
            return False
        if not kept:
            _log.warning(_NOT_KEPT, "another process has the key")
        return kept

    async def forget(self, answer: FirstAnswer) -> None:
        await run_in_threadpool(self._answers.forget, *self._of, answer)

    async def release(self) -> None:
        """Let go of the key, if the database answers; otherwise it is free after half a minute."""
        with suppress(*NO_ANSWER):
            await run_in_threadpool(self._answers.release, *self._of, self._holder)


async def _body(receive: Receive) -> bytes | None:
    """The body of a request; None if its caller has gone."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


def _kept(sent: list[Message]) -> FirstAnswer | None:
    """The answer in messages of ASGI, if it is one to keep: that something was made."""
    if not sent or not HTTPStatus.OK <= sent[0]["status"] < HTTPStatus.MULTIPLE_CHOICES:
        return None
    body = b"".join(message.get("body", b"") for message in sent[1:])
    if len(body) > _MOST_CHARACTERS:
        return None
    headers = tuple(
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in sent[0]["headers"]
        if name.lower() not in _OWN
    )
    return FirstAnswer(sent[0]["status"], headers, body.decode())


def _again(answer: FirstAnswer) -> Response:
    headers = {name: value for name, value in answer.headers if name.lower() != "content-type"} | {REPLAYED: "true"}
    media_type = dict(answer.headers).get("content-type")
    return Response(answer.body, answer.status, headers, media_type)


def _invalid(request: Request, given: str) -> Response:
    expected = "1 to 200 printable ASCII characters, once"
    found = Problem(f"header.{HEADER}", given, expected)
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    return problem(request, status, "invalid-request", str(found), [FieldProblem.model_validate(found.document())])
