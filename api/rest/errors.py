"""Every error of the REST API as one JSON shape: problem details (RFC 9457), made in one place."""

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
_FIT = re.compile(r"[A-Za-z0-9_.:-]{1,128}")

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
        app.add_exception_handler(kind, _of_ours(status))
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(OperationalError, _of_database)
    app.add_exception_handler(Exception, _of_anything)


def problem(
    request: Request,
    status: int,
    slug: str,
    detail: str,
    errors: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """A response with problem details; ``slug`` names the kind of problem, for programs."""
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
    """Gives every request an id, or keeps the one it came with if that is fit to be repeated in a log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID.encode(), b"").decode("latin-1")
        request_id = given if _FIT.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            # A request that came with an id came through Serve, which repeats it in the response by itself.
            if message["type"] == "http.response.start" and not given:
                message["headers"] = [*message["headers"], (REQUEST_ID.encode(), request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)


def _of_ours(status: HTTPStatus) -> Handler:
    async def handle(request: Request, error: Exception) -> JSONResponse:
        problems = error.problems if isinstance(error, InvalidJob) else ()
        errors = [FieldProblem.model_validate(found.document()) for found in problems]
        return problem(request, status, _slug(type(error).__name__), str(error), errors)

    return handle


async def _of_validation(request: Request, error: Exception) -> JSONResponse:
    """What FastAPI found wrong with a query, a header or a body; the body of a job is not checked by it but by JobSpec."""
    errors = []
    for found in error.errors() if isinstance(error, RequestValidationError) else ():
        where = [str(part) for part in found["loc"] if part != "body"]
        value = None if found["type"] == "missing" else repr(found["input"])[:120]
        if found["type"] == "json_invalid":
            return problem(
                request, HTTPStatus.BAD_REQUEST, "bad-request", f"the body is no JSON: {found['ctx']['error']}"
            )
        errors.append(FieldProblem(field=".".join(where) or "(body)", value=value, expected=_expected(found)))
    said = "; ".join(f"{one.field} is {one.value or 'missing'}; expected {one.expected}" for one in errors)
    return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-request", said, errors)


def _expected(found: Any) -> str:
    """What pydantic says of a field, as what was expected."""
    match found["type"]:
        case "missing":
            return "a value"
        case "extra_forbidden":
            return "no field of this name"
    return _PREAMBLE.sub("", found["msg"]).replace(" after validation", "")


async def _of_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    detail = error.detail
    if status is HTTPStatus.NOT_FOUND:
        detail = f"nothing is served at {request.url.path}; /docs lists what is"
    elif status is HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"{request.method} is not possible at {request.url.path}"
    return problem(request, status, _slug(status.phrase), detail, headers=error.headers)


async def _of_database(request: Request, error: Exception) -> JSONResponse:
    _log.error("request %s: the database does not answer: %s", request.scope["state"]["request_id"], error)
    detail = "the database of jobs does not answer; nothing was changed, so the request may be sent again"
    headers = {"Retry-After": _RETRY_SECONDS}
    return problem(request, HTTPStatus.SERVICE_UNAVAILABLE, "database-unavailable", detail, headers=headers)


async def _of_anything(request: Request, error: Exception) -> JSONResponse:
    """A mistake of ours: its traceback goes to the log under the request's id, and not over the wire."""
    request_id = request.scope["state"]["request_id"]
    _log.error("request %s failed", request_id, exc_info=error)
    detail = f"the service made a mistake ({type(error).__name__}); its log has it under the request id"
    # This response is made outside our middleware, so the id is put on it here.
    headers = None if REQUEST_ID in request.headers else {REQUEST_ID: request_id}
    return problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, "internal-error", detail, headers=headers)


def _slug(name: str) -> str:
    """``JobNotFound`` or ``Not Found`` → ``job-not-found``, ``not-found``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|\s+", "-", name).lower()
