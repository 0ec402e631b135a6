"""Lets in whoever has a key for what they ask."""

from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from chainfed_ray.api.rest.errors import no_database, problem
from chainfed_ray.api.serve.scopes import Needs, RouteNeeds
from chainfed_ray.cluster.access.identity import WITHOUT_KEYS, Identity
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.cluster.storage import WithoutKeys

_REALM = 'Bearer realm="chainfed"'
_POLICY_VIOLATION = 1008  # RFC 6455


@dataclass(frozen=True)
class AccessRules:
    """The keys of a service; and who is let in as long as none was made."""

    keys: KeyRing
    without_keys: WithoutKeys


class Access:
    """Middleware that lets a request in if its key has the scope that its route needs, and says who sends it.

    The key comes as ``Authorization: Bearer``.
    """

    def __init__(self, app: ASGIApp, rules: AccessRules, routes: RouteNeeds) -> None:
        self._app, self._routes = app, routes
        self._keys, self._without_keys = rules.keys, rules.without_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""
        if scope["type"] == "websocket":  # no route is one
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        refusal = await self._refusal(Request(scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    async def _refusal(self, request: Request) -> Response | None:
        needs = self._routes.of(request.scope)
        if needs == ():
            return None
        try:
            if needs != ("site",) and await self._keys.is_open():
                return self._without_key(request)
            return await self._with_key(request, needs)
        except NO_ANSWER as error:
            return no_database(request, error)

    def _without_key(self, request: Request) -> Response | None:
        if self._without_keys == "anyone" or (self._without_keys == "loopback" and _is_near(request)):
            request.state.identity = WITHOUT_KEYS
            return None
        detail = "no key was made for this service yet; `chainfed keys create` makes one, at the service's machine"
        return _unauthorized(request, "key-missing", detail)

    async def _with_key(self, request: Request, needs: Needs | None) -> Response | None:
        given = request.headers.getlist("authorization")
        if not given:
            detail = "the request has no key; expected the header `Authorization: Bearer cfr_…`"
            return _unauthorized(request, "key-missing", detail)
        scheme, _, token = given[0].partition(" ")
        identity = None
        if len(given) == 1 and scheme.lower() == "bearer":
            identity = await self._keys.identify(token.strip(" "))
        if identity is None:
            return _unauthorized(
                request,
                "key-invalid",
                "the key is not one of this service, was revoked or has expired",
                "invalid_token",
            )
        if needs and not any(identity.allows(scope) for scope in needs):
            return _forbidden(request, identity, needs)
        request.state.identity = identity
        return None


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
