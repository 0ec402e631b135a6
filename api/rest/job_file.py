"""A job file as the body of a request: JSON, or YAML."""

import json
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.exceptions import HTTPException

from chainfed_ray.errors import InvalidJob
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job, parse_yaml

# For the description of a route; app.py puts the schema where this refers to it.
BODY = {
    "requestBody": {
        "required": True,
        "description": "The job file, as JSON or as YAML.",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}},
            "application/yaml": {"schema": {"type": "string"}},
        },
    }
}
_YAML = ("application/yaml", "application/x-yaml", "text/yaml")


async def _read(request: Request) -> JobSpec:
    return _parse(await request.body(), request.headers.get("content-type", ""))


def _parse(body: bytes, content_type: str) -> JobSpec:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise HTTPException(400, "the body is not UTF-8") from None
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in _YAML:
        return parse_yaml(text)
    if media_type != "application/json":  # what a page of another site could send without asking first
        raise HTTPException(
            415, f"the body is {content_type or 'of no type'}; send application/json or application/yaml"
        )
    try:
        document: Any = json.loads(text, object_pairs_hook=_without_repeats)
    except (json.JSONDecodeError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    return parse_job(document)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise InvalidJob.at(repeated, document[repeated], "a key that is given once")
    return document


SubmittedJob = Annotated[JobSpec, Depends(_read)]
