"""Changes of a document as JSON merge patches (RFC 7396)."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from chainfed_ray.api.rest.job_file import document_in, media_type_of, read_body
from chainfed_ray.errors import InvalidJob

MEDIA_TYPE = "application/merge-patch+json"
_REFERENCE = {"$ref": "#/components/schemas/JobPatch"}
_EXAMPLE = {"name": "docstrings-2", "rounds": {"total": 40}, "seed": None}
SCHEMA = {"type": "object", "additionalProperties": True, "title": "JobPatch"}
# The description of such a body in the OpenAPI document.
BODY = {
    "requestBody": {
        "description": "What changes in the job's document: keys with new values; with null a key gets its default anew.",
        "content": {kind: {"schema": _REFERENCE, "example": _EXAMPLE} for kind in (MEDIA_TYPE, "application/json")},
    }
}


def patched(document: Any, patch: Any) -> Any:
    """The ``document`` after a ``patch``; it stays as it is. An object changes the keys that it has, null deletes one."""
    if not isinstance(patch, Mapping):
        return patch
    changed = dict(document) if isinstance(document, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            changed.pop(key, None)
        else:
            changed[key] = patched(changed.get(key), value)
    return changed


async def _read(request: Request) -> dict[str, Any]:
    body = await read_body(request)
    if not body:
        return {}
    media_type_of(request, MEDIA_TYPE, "application/json")
    patch = await run_in_threadpool(document_in, body)
    if not isinstance(patch, dict):
        raise InvalidJob.at("(patch)", patch, "an object with the keys that change")
    return patch


Patch = Annotated[dict[str, Any], Depends(_read)]
