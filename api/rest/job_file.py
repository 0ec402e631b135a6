"""Reads a job file from the body of a request, as JSON or YAML; and any other JSON, in which each key is given once."""

import json
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Annotated, Any

import yaml
from fastapi import Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from chainfed_ray.errors import InvalidJob
from chainfed_ray.reading import first_repeated
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job, parse_yaml

EXAMPLE = {
    "name": "docstrings",
    "model": {"base": "builtin:minilm"},
    "data": {"train": "builtin:docstrings"},
    "fleet": {"clients": [{"name": "phone", "count": 10, "memory": "96MiB"}]},
}
# The description of such a body in the OpenAPI document, which has the ``job_schemas`` that it refers to.
BODY = {
    "requestBody": {
        "required": True,
        "description": "The job file, as JSON or as YAML.",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}, "example": EXAMPLE},
            "application/yaml": {"schema": {"type": "string"}, "example": yaml.safe_dump(EXAMPLE, sort_keys=False)},
        },
    }
}
_MOST_DIGITS = 4000  # of a whole number that Python reads as one
_READ_HERE = 16 * 1024  # bytes
_MOST_BYTES = 256 * 1024
_YAML = ("application/yaml", "application/x-yaml", "text/yaml")


def job_schemas() -> dict[str, Any]:
    """The JSON schemas of a job and of its sections, by the names by which ``BODY`` and they themselves refer to them."""
    schema = JobSpec.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs"), "JobSpec": schema}


async def read_body(request: Request) -> bytes:
    """The body of a request, which may be as large as a job file.

    Raises:
        HTTPException: 413, if it is larger.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            raise HTTPException(
                413, f"a job file has {_MOST_BYTES // 1024} KiB at most; data goes into files that it names"
            )
    return bytes(body)


def media_type_of(request: Request, *accepted: str) -> str:
    """The type of a request's body, without parameters: one of ``accepted``.

    Requiring a type keeps foreign web pages out: without it, browsers would send their requests without a CORS check.

    Raises:
        HTTPException: 415, if it is another one, or there is none.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in accepted:
        given = f"the body has the type {content_type}" if content_type else "the body has no type"
        raise HTTPException(415, f"{given}; send {accepted[0]} or {accepted[1]}")
    return media_type


def document_in(body: bytes) -> Any:
    """The JSON in a body.

    Raises:
        HTTPException: 400, if it is not JSON in UTF-8.
        InvalidJob: a key is given twice.
    """
    try:
        return json.loads(_text(body), object_pairs_hook=_without_repeats, parse_int=_whole)
    except InvalidJob:
        raise
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {str(error)[:200]}") from None


async def _read(request: Request) -> JobSpec:
    body = await read_body(request)
    # In a thread: a job file may take seconds to parse, and others are served meanwhile.
    return await run_in_threadpool(_parse, body, media_type_of(request, "application/json", *_YAML))


def _parse(body: bytes, media_type: str) -> JobSpec:
    return parse_yaml(_text(body)) if media_type in _YAML else parse_job(document_in(body))


def _text(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise HTTPException(400, "the body is not UTF-8") from None


class _ManyDigits:
    """A whole number with more digits than Python reads. It is neither a number nor a text, so no key takes it."""

    def __init__(self, written: str) -> None:
        self._written = written

    def __repr__(self) -> str:
        return self._written


def _whole(written: str) -> "int | _ManyDigits":
    return int(written) if len(written) <= _MOST_DIGITS else _ManyDigits(written)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) == len(pairs):
        return document
    if (repeated := first_repeated(name for name, _ in pairs)) is not None:
        raise InvalidJob.at(repeated, document[repeated], "a key that is given once")
    return document


class _StrictRequest(Request):
    """A request whose JSON is refused if a key is given twice: of the two values, one would be left out without a word."""

    async def json(self) -> Any:
        """What the body says.

        Raises:
            InvalidJob: a key is given twice.
            JSONDecodeError: it is not JSON.
        """
        body = await self.body()
        read = partial(json.loads, body, object_pairs_hook=_without_repeats)
        # Others are answered meanwhile, if it takes longer than to change threads.
        return await run_in_threadpool(read) if len(body) > _READ_HERE else read()


class StrictRoute(APIRoute):
    """A route that reads its JSON so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See ``APIRoute``."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            try:
                return await handle(_StrictRequest(request.scope, request.receive))
            except HTTPException as error:  # FastAPI makes one of whatever went wrong with a body
                if isinstance(error.__cause__, InvalidJob):
                    raise error.__cause__ from None
                raise

        return strict


SubmittedJob = Annotated[JobSpec, Depends(_read)]
