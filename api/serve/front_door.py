"""What every request passes before it reaches a route: an id, a look at its host, at its key, and limits of its body."""

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from http import HTTPStatus
from ipaddress import ip_address
from time import monotonic
from uuid import uuid4

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chainfed_ray.api.rest.errors import REQUEST_ID, problem
from chainfed_ray.api.serve.access import Access, AccessRules
from chainfed_ray.api.serve.idempotency import Idempotency
from chainfed_ray.api.serve.scopes import RouteNames
from chainfed_ray.cluster.access.first_answers import FirstAnswers
from chainfed_ray.cluster.structured_logs import about
from chainfed_ray.cluster.tracing import note

BODY_SECONDS = 30.0
MOST_BYTES = 4 * 2**20
_RESTART_SECONDS = 5
LEAST_BYTES = 32 * 2**10  # of an upload, in each BODY_SECONDS that they are waited for
_STREAMED = re.compile(r"/v1/uploads/[^/]+/content")  # bodies of any size, which their route does not keep in memory
_log = logging.getLogger(__name__)
_SAFE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def add_front_door(
    app: FastAPI,
    allowed_hosts: Sequence[str],
    access: AccessRules | None = None,
    answers: FirstAnswers | None = None,
    drains: Callable[[], bool] | None = None,
) -> None:
    """Add these to ``app``, which has all its routes already. See ``AllowedHosts`` for ``allowed_hosts``.

    Without ``access``, no request needs a key. Without ``answers``, none is answered as it was before.
    Once the service ``drains``, every further request is refused.
    """
    if answers:
        app.add_middleware(Idempotency, answers=answers, routes=RouteNames(app))
    app.add_middleware(BodyLimits)
    if access:
        app.add_middleware(Access, rules=access, routes=RouteNames(app))
    app.add_middleware(AllowedHosts, allowed_hosts)
    if drains:
        app.add_middleware(Draining, drains=drains)
    app.add_middleware(RequestIds)  # the last that is added is the first that a request passes


class RequestIds:
    """Middleware that gives every request an id. It keeps a given id if that is safe to write into a log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID.encode(), b"").decode("latin-1")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        begun, status = monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            # A request that has an id came through Ray Serve, which adds the header to the response itself.
            if message["type"] == "http.response.start" and not given:
                message["headers"] = [*message["headers"], (REQUEST_ID.encode(), request_id.encode())]
            await send(message)

        note(request=request_id)
        with about(request=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                _tell(scope, status, monotonic() - begun)


def _tell(scope: Scope, status: int, seconds: float) -> None:
    """Say whose request is over, and about which job; and log it, where lines of logs are JSON.

    A ``status`` of 0 is that of a caller who left.
    """
    identity = scope["state"].get("identity")
    whose = {"tenant": identity.tenant} if identity else {}
    if job := scope.get("path_params", {}).get("job"):  # as the route that was found has it
        whose["job"] = job
    note(**whose)
    if not _log.isEnabledFor(logging.INFO):
        return
    what = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": round(seconds, 4)}
    _log.info("%s %s %d", scope["method"], scope["path"], status, extra={"about": what | whose})


class Draining:
    """Middleware that refuses every request once the service ``drains``. Those that came before are answered."""

    def __init__(self, app: ASGIApp, drains: Callable[[], bool]) -> None:
        self._app, self._drains = app, drains

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""
        if scope["type"] != "http" or not self._drains():
            await self._app(scope, receive, send)
            return
        headers = {"Retry-After": str(_RESTART_SECONDS), "Connection": "close"}
        detail = "the service is about to end; send the request again in a moment"
        answer = problem(Request(scope), HTTPStatus.SERVICE_UNAVAILABLE, "service-unavailable", detail, headers=headers)
        await answer(scope, receive, send)


class AllowedHosts:
    """Middleware that answers only to addresses, ``localhost`` and ``allowed`` names, which may begin with ``*.``.

    A web page may give its own name to this machine's address, and a browser would then let it read our answers (DNS
    rebinding). Such a request has the page's name as its host.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app, self._allowed = app, tuple(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"localhost").decode("latin-1").lower()
        name = re.sub(r":[0-9]*$", "", host)
        if self._is_allowed(name):
            await self._app(scope, receive, send)
            return
        detail = f"the host is {name[:100]!r}; expected an address, localhost or a name in CHAINFED_ALLOWED_HOSTS"
        answer = problem(Request(scope), HTTPStatus.MISDIRECTED_REQUEST, "host-not-allowed", detail)
        await answer(scope, receive, send)

    def _is_allowed(self, name: str) -> bool:
        if name == "localhost" or name.endswith(".localhost") or _is_address(name):
            return True
        return any(name == one or (one.startswith("*") and name.endswith(one[1:])) for one in self._allowed)


def _is_address(name: str) -> bool:
    try:
        ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


class BodyLimits:
    """Middleware that refuses a body of more than ``MOST_BYTES``, and one that is waited for longer than ``BODY_SECONDS``.

    The bytes of an upload may be more, and their route knows how many. ``LEAST_BYTES`` of them, or the rest, come in every
    ``BODY_SECONDS``, so nobody holds a request by a byte now and then. Only waiting counts, and not what the route does.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""
        left, count, whole = BODY_SECONDS, 0, scope["type"] != "http"
        streamed = not whole and _STREAMED.fullmatch(scope["path"]) is not None

        async def receive_in_time() -> Message:
            nonlocal left, count, whole
            if whole:  # what comes now is that the caller goes away
                return await receive()
            began = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(left):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, _too_slow(streamed)) from None
            left -= asyncio.get_running_loop().time() - began
            count += len(message.get("body", b""))
            if streamed and count >= LEAST_BYTES:
                left, count = BODY_SECONDS, 0
            if not streamed and count > MOST_BYTES:
                raise HTTPException(413, f"the body has more than {MOST_BYTES // 2**20} MiB")
            whole = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)


def _too_slow(streamed: bool) -> str:
    if streamed:
        return f"fewer than {LEAST_BYTES} bytes of the body came in {BODY_SECONDS:g} s; those that came are kept"
    return f"the body was not there after {BODY_SECONDS:g} s"
