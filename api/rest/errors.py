"""Turns every error of the REST API into one JSON format: problem details (RFC 9457)."""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from chainfed_ray.api.rest.service import CallerGone
from chainfed_ray.api.schemas.problems import FieldProblem, OpenAIError, ProblemDetails
from chainfed_ray.cluster.database import NO_ANSWER, is_in_doubt
from chainfed_ray.errors import (
    AnswerRefused,
    ArtifactNotFound,
    ChainFedError,
    InvalidJob,
    JobConflict,
    JobNotFound,
    LimitReached,
    ModelNotFound,
    OrderWithdrawn,
    PackageMissing,
    PartUnavailable,
    PreconditionFailed,
    ServiceBusy,
    SiteSuperseded,
    UploadConflict,
    UploadNotFound,
)
from chainfed_ray.problem import MISSING, Problem
from chainfed_ray.reading import OF_DISKS

MEDIA_TYPE = "application/problem+json"
REQUEST_ID = "x-request-id"
_RETRY_SECONDS = "5"
_PREAMBLE = re.compile(r"^Value error, |^\w+ should (be|have) ")

Handler = Callable[[Request, Exception], Awaitable[Response]]

_STATUS: Mapping[type[ChainFedError], HTTPStatus] = {
    InvalidJob: HTTPStatus.UNPROCESSABLE_ENTITY,
    JobNotFound: HTTPStatus.NOT_FOUND,
    ModelNotFound: HTTPStatus.NOT_FOUND,
    JobConflict: HTTPStatus.CONFLICT,
    PreconditionFailed: HTTPStatus.PRECONDITION_FAILED,
    PackageMissing: HTTPStatus.NOT_IMPLEMENTED,
    LimitReached: HTTPStatus.TOO_MANY_REQUESTS,
    ServiceBusy: HTTPStatus.TOO_MANY_REQUESTS,
    PartUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    OrderWithdrawn: HTTPStatus.GONE,
    AnswerRefused: HTTPStatus.UNPROCESSABLE_ENTITY,
    SiteSuperseded: HTTPStatus.CONFLICT,
    UploadNotFound: HTTPStatus.NOT_FOUND,
    ArtifactNotFound: HTTPStatus.NOT_FOUND,
    UploadConflict: HTTPStatus.CONFLICT,
}
# Python 3.13 has other names for these than 3.11 has.
_SLUGS = {413: "content-too-large", 416: "range-not-satisfiable"}
_CLIENT_CLOSED = 499  # nginx's status for a caller that has disconnected; only logs see it
_MOST_PROBLEMS = 100  # in one answer
_log = logging.getLogger(__name__)


def handle_errors(app: FastAPI) -> None:
    """Make ``app`` answer every error with problem details."""
    for kind, status in _STATUS.items():
        app.add_exception_handler(kind, _handler(status))
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(CallerGone, _on_caller_gone)
    for database_error in NO_ANSWER:
        app.add_exception_handler(database_error, _on_database_error)
    app.add_exception_handler(OSError, _on_disk_error)
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
        error=OpenAIError(
            message=detail,
            type="invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error",
            param=errors[0].field if errors else None,
            code=slug.replace("-", "_"),
        ),
    )
    return JSONResponse(body.model_dump(), status_code=status, media_type=MEDIA_TYPE, headers=headers)


def _handler(status: HTTPStatus) -> Handler:
    """The handler of a kind of ``ChainFedError`` that is answered with ``status``."""

    async def handle(request: Request, error: Exception) -> Response:
        problems = error.problems if isinstance(error, InvalidJob) else ()
        errors = [FieldProblem.model_validate(found.document()) for found in problems]
        seconds = error.seconds if isinstance(error, LimitReached | ServiceBusy | PartUnavailable) else None
        headers = None if seconds is None else {"Retry-After": str(seconds)}
        return problem(request, status, _slug(type(error).__name__), str(error), errors, headers)

    return handle


async def _on_invalid_request(request: Request, error: Exception) -> JSONResponse:
    """Answer a query, header or body that FastAPI found invalid. Job files never get here: ``parse_job`` checks them."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()[:_MOST_PROBLEMS]
    for one in found:
        if one["type"] == "json_invalid":
            detail = f"the body is not JSON: {one['ctx']['error']}"
            return problem(request, HTTPStatus.BAD_REQUEST, "bad-request", detail)
    problems = [
        Problem(
            ".".join(str(part) for part in one["loc"] if part != "body") or "(body)",
            MISSING if one["type"] == "missing" else one["input"],
            _expected(one),
        )
        for one in found
    ]
    detail = "; ".join(map(str, problems))
    errors = [FieldProblem.model_validate(one.document()) for one in problems]
    return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-request", detail, errors)


def _expected(found: Any) -> str:
    """Derive what was expected from pydantic's message on an invalid field."""
    match found["type"]:
        case "missing":
            return "a value"
        case "extra_forbidden":
            return "no field of this name"
        case "none_required":
            return "null"
    return _PREAMBLE.sub("", found["msg"]).replace(" after validation", "")


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return http_problem(request, error)


def http_problem(request: Request, error: HTTPException) -> JSONResponse:
    """The answer to a request that is refused with a status alone."""
    status = HTTPStatus(error.status_code)
    detail, headers = error.detail, error.headers
    if status is HTTPStatus.NOT_FOUND:
        detail = f"there is no route {request.url.path}; /docs lists the routes"
    elif status is HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"the route {request.url.path} does not accept {request.method}"
        headers = {"Allow": ", ".join(_methods_of(request))}
    return problem(request, status, _SLUGS.get(status) or _slug(status.phrase), detail, headers=headers)


def _methods_of(request: Request) -> list[str]:
    """The methods that some route with the request's path accepts. Starlette names those of the first route alone."""
    routes, scope = request.app.routes, request.scope
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    ]


async def _on_caller_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED)


async def _on_database_error(request: Request, error: Exception) -> JSONResponse:
    return no_database(request, error)


def no_database(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request while the database does not answer."""
    _log.error("request %s: the database does not answer: %s", request.scope["state"]["request_id"], error)
    detail = "the database of jobs does not answer; nothing was changed, so it is safe to send the request again"
    if is_in_doubt(error):
        detail = (
            "the database of jobs did not answer a commit, so it is not known whether the request was done; look before you "
            "send it again (a job that was sent with an Idempotency-Key is queued once, if it is sent again with the same one)"
        )
    headers = {"Retry-After": _RETRY_SECONDS}
    return problem(request, HTTPStatus.SERVICE_UNAVAILABLE, "database-unavailable", detail, headers=headers)


async def _on_disk_error(request: Request, error: Exception) -> JSONResponse:
    """Answer where a disk or the object store is full or away. Any other error of the operating system is unexpected."""
    if not isinstance(error, OSError) or error.errno not in OF_DISKS:
        raise error
    _log.error("request %s: the storage does not answer: %s", request.scope["state"]["request_id"], error)
    detail = f"the storage does not answer ({error.strerror}); the request can be sent again"
    headers = {"Retry-After": _RETRY_SECONDS}
    return problem(request, HTTPStatus.SERVICE_UNAVAILABLE, "part-unavailable", detail, headers=headers)


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
