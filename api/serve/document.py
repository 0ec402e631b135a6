"""The OpenAPI document of the REST API: what FastAPI derives from the routes, and what it cannot know."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from chainfed_ray.api.jobs.merge_patch import SCHEMA as JOB_PATCH
from chainfed_ray.api.rest.errors import MEDIA_TYPE
from chainfed_ray.api.rest.job_file import job_schemas
from chainfed_ray.api.serve.idempotency import HEADER, KEY_PATTERN
from chainfed_ray.api.serve.scopes import KEYED, NEEDS

_PROBLEM = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}}
_RETRY_AFTER = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
_METHODS_WITH_BODY = ("post", "put", "patch")
_ERRORS = {
    "400": "The body is not what its type says",
    "401": "The request has no key, or one that is not valid",
    "403": "The key does not allow this",
    "404": "There is no such job, model, upload or route",
    "405": "The route does not accept this method",
    "408": "The body was not there in time",
    "409": "The state of the job or upload does not allow this, or the `Idempotency-Key` was used before",
    "412": "The job is not as it was when it had the `ETag` in `If-Match`; nothing was done",
    "413": "The body is too large",
    "415": "The body has another type",
    "421": "The service does not answer to this host",
    "422": "The request is not valid; `errors` has every field",
    "429": "The service does as much of this as it can",
    "500": "A mistake of the service",
    "501": "A package is not installed",
    "502": "The process that was to answer has ended; whether the request was carried out is not known",
    "503": "The database or a process of the service does not answer",
    "504": "The process that was to answer did not answer in time",
}
_WITH_BODY = frozenset({"400", "408", "413", "415"})
_WITH_KEY = frozenset({"401", "403"})
_CHALLENGE = {"WWW-Authenticate": {"description": "`Bearer`, and what is wrong", "schema": {"type": "string"}}}
_HEADERS = {"429": _RETRY_AFTER, "503": _RETRY_AFTER, "401": _CHALLENGE, "403": _CHALLENGE}
_REQUEST_ID = "X-Request-ID"
_HEADER_OF_ALL = {
    "description": "the request's id: the one that the request came with, or a new one",
    "schema": {"type": "string"},
}
_LOCATION = {"Location": {"description": "the path of what was made", "schema": {"type": "string"}}}
_PLACES = {"job": "the id of a job", "name": "the name of a model, such as `minilm:docstrings`"}
_KEY = "key"
_IDEMPOTENCY_KEY = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "pattern": KEY_PATTERN},
    "description": "1 to 200 printable ASCII characters. The same request with the same key gets the answer of the first "
    "one, so that it is safe to send it again; another request with the key is refused",
}
_SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "description": "A key that `chainfed keys create` made. A service in which no key was made asks for none",
}


def operation_id(route: APIRoute) -> str:
    """The id of an operation: the name of its function."""
    return route.name


def describe(app: FastAPI, with_keys: bool) -> None:
    """Complete the OpenAPI document of ``app``: the schema of job files, keys if there are any, and every error."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            parts = document["components"]["schemas"]
            parts.update(job_schemas())
            parts["JobPatch"] = JOB_PATCH
            document["components"]["headers"] = {_REQUEST_ID: _HEADER_OF_ALL}
            _make_exact(document)
            for unused in ("HTTPValidationError", "ValidationError"):
                parts.pop(unused, None)
            if with_keys:
                _add_keys(document)
            for name, path in document["paths"].items():
                for method, operation in path.items():
                    if f"{method.upper()} {name}" in KEYED:
                        _add_idempotency_key(operation)
                    _add_errors(operation, method in _METHODS_WITH_BODY and "requestBody" in operation)
                    _add_headers(operation)
                    _describe_places(operation)
        return app.openapi_schema or document

    app.openapi = described  # type: ignore[method-assign]


def _make_exact(part: Any) -> None:
    """Correct the largest seed: FastAPI keeps bounds as floats, and none of them is 2**63 − 1."""
    if isinstance(part, dict):
        if part.get("maximum") == 2.0**63:
            part["maximum"] = 2**63 - 1
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            _make_exact(inner)


def _add_keys(document: dict[str, Any]) -> None:
    """Say which key each operation needs."""
    document["components"]["securitySchemes"] = {_KEY: _SCHEME}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            operation["security"] = [{_KEY: [scope]} for scope in NEEDS[f"{method.upper()} {path}"]]


def _add_idempotency_key(operation: dict[str, Any]) -> None:
    """Say that the operation takes such a key, whether its route reads it or not."""
    others = [given for given in operation.get("parameters", ()) if given["name"].lower() != HEADER]
    operation["parameters"] = [*others, _IDEMPOTENCY_KEY]


def _add_headers(operation: dict[str, Any]) -> None:
    """Say which headers every answer has, and that one to a request that made something says where that is."""
    for status, response in operation["responses"].items():
        more = {_REQUEST_ID: {"$ref": f"#/components/headers/{_REQUEST_ID}"}} | (_LOCATION if status == "201" else {})
        response["headers"] = response.get("headers", {}) | more


def _takes(operation: dict[str, Any], header: str) -> bool:
    return any(given["name"].lower() == header for given in operation.get("parameters", ()))


def _describe_places(operation: dict[str, Any]) -> None:
    """Describe the parts of a path of which the route has no words of its own."""
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path" and parameter["name"] in _PLACES:
            parameter.setdefault("description", _PLACES[parameter["name"]])


def _add_errors(operation: dict[str, Any], has_body: bool) -> None:
    """Say that each error is problem details. A response that a route describes itself is left as it is."""
    responses = operation["responses"]
    for known in ("4XX", "5XX", "422"):  # FastAPI's own words for them
        responses.pop(known, None)
    for status, description in _ERRORS.items():
        is_possible = (has_body or status not in _WITH_BODY) and (operation.get("security") or status not in _WITH_KEY)
        is_possible = is_possible and (status != "412" or _takes(operation, "if-match"))
        if status not in responses and is_possible:
            headers = {"headers": _HEADERS[status]} if status in _HEADERS else {}
            responses[status] = {"description": description, "content": _PROBLEM, **headers}
