"""Turns every error of the REST API into one JSON format: problem details (RFC 9457)."""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chainfed_ray.api.rest.schemas import FieldProblem, ProblemDetails
from chainfed_ray.errors import ChainFedError, InvalidJob, JobConflict, JobNotFound, ModelNotFound, PackageMissing

MEDIA_TYPE = "application/problem+json"
REQUEST_ID = "x-request-id"
_RETRY_SECONDS = "5"
_PREAMBLE = re.compile(r"^Value error, |^\w+ should (be|have) ")
_SAFE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")

Handler = Callable[[Request, Exception], Awaitable[JSONResponse]]

_STATUS: Mapping[type[ChainFedError], HTTPStatus] = {
    InvalidJob: HTTPStatus.UNPROCESSABLE_ENTITY,
    JobNotFound: HTTPStatus.NOT_FOUND,
    ModelNotFound: HTTPStatus.NOT_FOUND,
    JobConflict: HTTPStatus.CONFLICT,
    PackageMissing: HTTPStatus.NOT_IMPLEMENTED,
}
_log = logging.getLogger(__name__)


def handle_errors(app: FastAPI) -> None:
    """Make ``app`` answer every error with problem details."""
    for kind, status in _STATUS.items():
        app.add_exception_handler(kind, _handler(status))
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(OperationalError, _on_database_error)
    app.add_exception_handler(Exception, _on_unexpected_error)


def problem(
    request: Request,
    status: int,
    slug: str,
    detail: str,
    errors: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """A response with problem details. ``slug`` is the kind of problem that programs see, such as ``job-not-found``."""
    body = ProblemDetails(
        type=f"urn:chainfed:problem:{slug}",
        title=slug.replace("-", " ").capitalize(),
        status=status,
        detail=detail,
        instance=request.url.path,
        request_id=request.scope["state"]["request_id"],
        errors=list(errors),
    )
    return JSONResponse(body.model_dump(), status_code=status, media_type=MEDIA_TYPE, headers=headers)


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

        async def send_with_id(message: Message) -> None:
            # A request that has an id came through Ray Serve, which adds the header to the response itself.
            if message["type"] == "http.response.start" and not given:
                message["headers"] = [*message["headers"], (REQUEST_ID.encode(), request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)


def _handler(status: HTTPStatus) -> Handler:
    """The handler of a kind of ``ChainFedError`` that is answered with ``status``."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        problems = error.problems if isinstance(error, InvalidJob) else ()
        errors = [FieldProblem.model_validate(found.document()) for found in problems]
        return problem(request, status, _slug(type(error).__name__), str(error), errors)

    return handle


async def _on_invalid_request(request: Request, error: Exception) -> JSONResponse:
    """Answer a query, header or body that FastAPI found invalid. Job files never get here: ``parse_job`` checks them."""
    errors = []
    for found in error.errors() if isinstance(error, RequestValidationError) else ():
        where = [str(part) for part in found["loc"] if part != "body"]
        value = None if found["type"] == "missing" else repr(found["input"])[:120]
        if found["type"] == "json_invalid":
            return problem(
                request, HTTPStatus.BAD_REQUEST, "bad-request", f"the body is not JSON: {found['ctx']['error']}"
            )
        errors.append(FieldProblem(field=".".join(where) or "(body)", value=value, expected=_expected(found)))
    detail = "; ".join(f"{one.field} is {one.value or 'missing'}; expected {one.expected}" for one in errors)
    return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-request", detail, errors)


def _expected(found: Any) -> str:
    """Derive what was expected from pydantic's message on an invalid field."""
    match found["type"]:
        case "missing":
            return "a value"
        case "extra_forbidden":
            return "no field of this name"
    return _PREAMBLE.sub("", found["msg"]).replace(" after validation", "")


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    detail = error.detail
    if status is HTTPStatus.NOT_FOUND:
        detail = f"there is no route {request.url.path}; /docs lists the routes"
    elif status is HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"the route {request.url.path} does not accept {request.method}"
    return problem(request, status, _slug(status.phrase), detail, headers=error.headers)


async def _on_database_error(request: Request, error: Exception) -> JSONResponse:
    _log.error("request %s: the database does not answer: %s", request.scope["state"]["request_id"], error)
    detail = "the database of jobs does not answer; nothing was changed, so it is safe to send the request again"
    headers = {"Retry-After": _RETRY_SECONDS}
    return problem(request, HTTPStatus.SERVICE_UNAVAILABLE, "database-unavailable", detail, headers=headers)


async def _on_unexpected_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an error that nothing else handles. Its traceback goes to the log under the request's id, not to the caller."""
    request_id = request.scope["state"]["request_id"]
    _log.error("request %s failed", request_id, exc_info=error)
    detail = f"the service failed ({type(error).__name__}); its log has the traceback under the request id"
    # This response bypasses RequestIds, so the header is added here.
    headers = None if REQUEST_ID in request.headers else {REQUEST_ID: request_id}
    return problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, "internal-error", detail, headers=headers)


def _slug(name: str) -> str:
    """A name for programs: ``JobNotFound`` becomes ``job-not-found``, and ``Not Found`` becomes ``not-found``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|\s+", "-", name).lower()
