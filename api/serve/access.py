"""Lets in whoever has a key for what they ask."""

from dataclasses import dataclass, field
from http import HTTPStatus
from ipaddress import ip_address

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chainfed_ray.api.rest.errors import no_database, problem
from chainfed_ray.api.serve.scopes import NEEDS, Needs, RouteNames
from chainfed_ray.cluster.access.audit import Act, AuditLog
from chainfed_ray.cluster.access.identity import WITHOUT_KEYS, Identity
from chainfed_ray.cluster.access.identity import Scope as KeyScope
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.access.rates import Rates
from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.cluster.storage import REQUESTS, WithoutKeys
from chainfed_ray.errors import LimitReached
from chainfed_ray.units import counted

_REALM = 'Bearer realm="chainfed"'
_POLICY_VIOLATION = 1008  # RFC 6455
OF_KEY = "its requests_per_minute"  # as `chainfed keys list --json` calls it
_PUT_DOWN = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)  # refusals; those for a rate come by the thousand
_CHANGING: frozenset[KeyScope] = frozenset({"submit", "admin"})  # scopes of the requests that are put down


class _KeyEnded(Exception):
    """The key of a request was revoked, or has expired, while its answer is sent."""


@dataclass(frozen=True)
class AccessRules:
    """The keys of a service; who is let in as long as none was made; how much a tenant may ask, and where it is put down.

    ``key_rates`` counts the requests of keys that have a limit of their own.
    """

    keys: KeyRing
    without_keys: WithoutKeys
    rates: Rates = field(default_factory=lambda: Rates(None))
    audit: AuditLog | None = None
    key_rates: Rates = field(default_factory=lambda: Rates(None))


class Access:
    """Middleware that lets a request in if its key has the scope that its route needs, and says who sends it.

    The key comes as ``Authorization: Bearer``. A stream ends when its key does. What changes something, and who is refused, is
    put into the audit log.
    """

    def __init__(self, app: ASGIApp, rules: AccessRules, routes: RouteNames) -> None:
        self._app, self._routes, self._rules = app, routes, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""
        if scope["type"] == "websocket":  # no route is one
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        elif scope["type"] == "http":
            await self._handle(Request(scope), receive, send)
        else:
            await self._app(scope, receive, send)

    async def _handle(self, request: Request, receive: Receive, send: Send) -> None:
        route = self._routes.of(request.scope)
        refusal = None if route and not NEEDS[route] else await self._refusal(request, route)
        if refusal:
            if refusal.status_code in _PUT_DOWN:
                await self._put_down(request, route, refusal.status_code, request.url.path, is_refusal=True)
            await refusal(request.scope, receive, send)
            return

        changes = route is not None and _CHANGING & {*NEEDS[route]} and request.method not in ("GET", "HEAD")

        is_answered = False

        async def send_on(message: Message) -> None:
            nonlocal is_answered
            is_answered = is_answered or message["type"] == "http.response.start"
            if message["type"] == "http.response.start" and changes:
                made = Headers(raw=message["headers"]).get("location", request.url.path)
                await self._put_down(request, route, message["status"], made)
            if message.get("more_body") and route and not await self._is_still_let_in(request):
                raise _KeyEnded
            await send(message)

        try:
            try:
                await self._app(request.scope, receive, send_on)
            except Exception:
                if changes and not is_answered:  # it may be done in part, and the answer is made further out
                    await self._put_down(request, route, HTTPStatus.INTERNAL_SERVER_ERROR, request.url.path)
                raise
        except* _KeyEnded:  # in a group, if the answer is sent by one of several tasks
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _is_still_let_in(self, request: Request) -> bool:
        """Whether who was let in would be now. A stream goes on while the database does not answer."""
        identity: Identity | None = getattr(request.state, "identity", None)
        if identity is None:  # the route needs no key
            return True
        try:
            return await self._rules.keys.is_valid(identity)
        except NO_ANSWER:
            return True

    async def _refusal(self, request: Request, route: str | None) -> Response | None:
        try:
            needs = NEEDS[route] if route else ()
            if needs != ("site",) and await self._rules.keys.is_open():
                return self._without_key(request)
            return await self._with_key(request, needs)
        except NO_ANSWER as error:
            return no_database(request, error)

    def _without_key(self, request: Request) -> Response | None:
        who = self._rules.without_keys
        if who == "anyone" or (who == "loopback" and _is_near(request)):
            request.state.identity = WITHOUT_KEYS
            return None
        detail = "no key was made for this service yet; `chainfed keys create` makes one, at the service's machine"
        return _unauthorized(request, "key-missing", detail)

    async def _with_key(self, request: Request, needs: Needs) -> Response | None:
        given = request.headers.getlist("authorization")
        if not given:
            detail = "the request has no key; expected the header `Authorization: Bearer cfr_…`"
            return _unauthorized(request, "key-missing", detail)
        scheme, _, token = given[0].partition(" ")
        identity = None
        if len(given) == 1 and scheme.lower() == "bearer":
            identity = await self._rules.keys.identify(token.strip(" "))
        if identity is None:
            return _unauthorized(
                request,
                "key-invalid",
                "the key is not one of this service, was revoked or has expired",
                "invalid_token",
            )
        request.state.identity = identity
        if error := self._limit_reached(identity):
            headers = {"Retry-After": str(error.seconds)}
            return problem(request, HTTPStatus.TOO_MANY_REQUESTS, "limit-reached", str(error), headers=headers)
        if needs and not any(identity.allows(scope) for scope in needs):
            return _forbidden(request, identity, needs)
        return None

    def _limit_reached(self, identity: Identity) -> LimitReached | None:
        """Count a request, unless its key or its tenant may not send it: then it counts for neither."""
        if identity.site is not None:  # how much a site sends follows from its orders
            return None
        of_key, of_tenant = identity.requests_per_minute, self._rules.rates.per_minute
        if of_key and (seconds := self._rules.key_rates.wait_seconds(identity.key, of_key)):
            return LimitReached(f"the key {identity.key}", _a_minute(of_key), OF_KEY, seconds)
        if of_tenant and (seconds := self._rules.rates.wait_seconds(identity.tenant)):
            self._rules.key_rates.give_back(identity.key)
            return LimitReached(identity.tenant, _a_minute(of_tenant), REQUESTS, seconds)
        return None

    async def _put_down(
        self, request: Request, route: str | None, status: int, target: str, is_refusal: bool = False
    ) -> None:
        """Put a request and what came of it into the audit log."""
        if self._rules.audit is None:
            return
        identity: Identity | None = getattr(request.state, "identity", None)
        act = Act(
            tenant=identity.tenant if identity else None,
            key=identity.key or None if identity else None,
            action=route or request.method,
            target=target,
            address=request.client.host if request.client else "",
            outcome=str(status),
            request=request.state.request_id,
        )
        await run_in_threadpool(self._rules.audit.note, act, is_refusal)


def _a_minute(most: int) -> str:
    return f"{counted(most, 'request', 'requests')} a minute"


def _is_near(request: Request) -> bool:
    """Whether a request comes from this machine. A proxy here may say for whom it asks (``X-Forwarded-For``)."""
    try:
        return request.client is not None and ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _unauthorized(request: Request, slug: str, detail: str, error: str | None = None) -> Response:
    challenge = _REALM if error is None else f'{_REALM}, error="{error}"'
    return problem(request, HTTPStatus.UNAUTHORIZED, slug, detail, headers={"WWW-Authenticate": challenge})


def _forbidden(request: Request, identity: Identity, needs: Needs) -> Response:
    allowed = ", ".join(sorted(identity.scopes))
    detail = f"the key {identity.key} allows {allowed}; this needs {' or '.join(needs)}"
    challenge = f'{_REALM}, error="insufficient_scope", scope="{" ".join(needs)}"'
    return problem(request, HTTPStatus.FORBIDDEN, "scope-missing", detail, headers={"WWW-Authenticate": challenge})
