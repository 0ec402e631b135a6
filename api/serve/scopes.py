"""Which key each route needs: one table, which has every route of the service."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette._utils import get_route_path  # the path by which Starlette itself finds a route
from starlette.routing import compile_path
from starlette.types import Scope as Connection

from chainfed_ray.cluster.access.identity import Scope

Needs = tuple[Scope, ...]
"""The scopes of which a key must have one. Without any, the route needs no key."""
_NONE: Needs = ()
_SITE: Needs = ("site",)
_FILES = "GET"  # of a folder of files, which has no methods of its own

NEEDS: Mapping[str, Needs] = {
    "GET /healthz": _NONE,
    "GET /readyz": _NONE,
    "GET /metrics": ("read",),
    "GET /v1/audit": ("admin",),
    "GET /openapi.json": _NONE,
    "GET /docs": _NONE,
    "GET /docs/oauth2-redirect": _NONE,
    "GET /static-offline-docs/{path}": _NONE,
    "POST /v1/plan": ("submit",),
    "POST /v1/jobs": ("submit",),
    "GET /v1/jobs": ("read",),
    "GET /v1/jobs/{job}": ("read",),
    "GET /v1/jobs/{job}/events": ("read",),
    "GET /v1/jobs/{job}/clients": ("read",),
    "POST /v1/jobs/{job}/pause": ("submit",),
    "POST /v1/jobs/{job}/resume": ("submit",),
    "POST /v1/jobs/{job}/cancel": ("submit",),
    "GET /v1/jobs/{job}/logs": ("read",),
    "GET /v1/jobs/{job}/artifacts": ("read",),
    "GET /v1/jobs/{job}/artifacts/{name}": ("read",),
    "POST /v1/uploads": ("submit",),
    "GET /v1/uploads": ("read",),
    "GET /v1/uploads/{upload}": ("read",),
    "PUT /v1/uploads/{upload}/content": ("submit",),
    "DELETE /v1/uploads/{upload}": ("submit",),
    "POST /v1/jobs/{job}/retry": ("submit",),
    "POST /v1/jobs/{job}/clone": ("submit",),
    "DELETE /v1/jobs/{job}": ("submit",),
    "GET /v1/models": ("read", "infer"),
    "GET /v1/models/{name}": ("read", "infer"),
    "GET /v1/aliases": ("read", "infer"),
    "PUT /v1/aliases/{alias}": ("submit",),
    "POST /v1/aliases/{alias}/rollback": ("submit",),
    "DELETE /v1/aliases/{alias}": ("submit",),
    "POST /v1/classify": ("infer",),
    "POST /v1/completions": ("infer",),
    "POST /v1/chat/completions": ("infer",),
    "POST /v1/embeddings": ("infer",),
    "POST /v1/site/session": _SITE,
    "POST /v1/site/leave": _SITE,
    "POST /v1/site/orders/next": _SITE,
    "POST /v1/site/orders/{order}/heartbeat": _SITE,
    "GET /v1/site/orders/{order}/document": _SITE,
    "GET /v1/site/orders/{order}/tensors": _SITE,
    "GET /v1/site/orders/{order}/tensors/received": _SITE,
    "PUT /v1/site/orders/{order}/tensors": _SITE,
    "POST /v1/site/orders/{order}/answer": _SITE,
}

KEYED: frozenset[str] = frozenset(
    route
    for route, needs in NEEDS.items()
    if route.startswith("POST ") and "submit" in needs and route != "POST /v1/plan"
)
"""The routes that take an ``Idempotency-Key``: those that make or change something, and would do so twice."""


class _Route(NamedTuple):
    name: str  # as in the table
    method: str
    path: re.Pattern[str]


class RouteNames:
    """Finds the route of a request to ``app``, which must have all its routes already. Each must be in the table.

    Raises:
        LookupError: the table lacks a route, or has one that the application has not.
    """

    def __init__(self, app: FastAPI) -> None:
        routes = [*routes_of(app)]
        if wrong := {route.name for route in routes} ^ NEEDS.keys():
            raise LookupError(f"the table of scopes and the application differ in {', '.join(sorted(wrong))}")
        self._routes = {method: [one for one in routes if one.method == method] for _, method, _ in routes}

    def of(self, connection: Connection) -> str | None:
        """The route of a request, as in the table. None if there is none, or it does not have the method."""
        path, method = get_route_path(connection), connection["method"]
        method = "GET" if method == "HEAD" else method
        for route in self._routes.get(method, ()):
            if route.path.match(path):
                return route.name
        return None


def routes_of(app: FastAPI) -> Iterator[_Route]:
    """Every method of every route, in the order in which the application looks for the route of a request."""
    for route in iter_route_contexts(app.routes):
        path, is_folder = route.path or "", route.methods is None
        pattern, plain, _ = compile_path(f"{path}/{{path:path}}" if is_folder else path)
        for method in sorted(route.methods or {_FILES}):
            if method != "HEAD":
                yield _Route(f"{method} {plain}", method, pattern)
