"""Reads a job file from the body of a request, as JSON or YAML."""

import json
from typing import Annotated, Any

import yaml
from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from chainfed_ray.errors import InvalidJob
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job, parse_yaml

EXAMPLE = {
    "name": "docstrings",
    "model": {"base": "builtin:minilm"},
    "data": {"train": "builtin:docstrings"},
    "fleet": {"clients": [{"name": "phone", "count": 10, "memory": "96MiB"}]},
}
# The description of such a body in the OpenAPI document. api/serve adds the schema that it refers to.
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
_MOST_BYTES = 256 * 1024
_YAML = ("application/yaml", "application/x-yaml", "text/yaml")


async def _read(request: Request) -> JobSpec:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            raise HTTPException(
                413, f"a job file has {_MOST_BYTES // 1024} KiB at most; data goes into files that it names"
            )
    # In a thread: a job file may take seconds to parse, and others are served meanwhile.
    return await run_in_threadpool(_parse, bytes(body), request.headers.get("content-type", ""))


def _parse(body: bytes, content_type: str) -> JobSpec:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise HTTPException(400, "the body is not UTF-8") from None
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in _YAML:
        return parse_yaml(text)
    # Requiring this type keeps foreign web pages out: without it, browsers would send their requests without a CORS check.
    if media_type != "application/json":
        given = f"the body has the type {content_type}" if content_type else "the body has no type"
        raise HTTPException(415, f"{given}; send application/json or application/yaml")
    try:
        document: Any = json.loads(text, object_pairs_hook=_without_repeats)
    except InvalidJob:
        raise
    except (ValueError, RecursionError) as error:  # also numbers of more digits than Python reads
        raise HTTPException(400, f"the body is not JSON: {str(error)[:200]}") from None
    return parse_job(document)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        seen = set[str]()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidJob.at(repeated, document[repeated], "a key that is given once")
    return document


SubmittedJob = Annotated[JobSpec, Depends(_read)]
