"""Routes of a job's artifacts: what it leaves for people to have."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.types import Message, Receive, Scope, Send

from chainfed_ray.api.jobs.report import ensure_report
from chainfed_ray.api.rest.errors import MEDIA_TYPE
from chainfed_ray.api.rest.job_file import StrictRoute
from chainfed_ray.api.rest.service import Jobs, WithService
from chainfed_ray.cluster.files.artifacts import artifact, names_of
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.tables import FINISHED
from chainfed_ray.errors import ArtifactNotFound

router = APIRouter(prefix="/v1/jobs", tags=["artifacts"], route_class=StrictRoute)

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_PROBLEM = {"$ref": "#/components/schemas/ProblemDetails"}
_ANY = "application/octet-stream"
_TYPES = {".json": "application/json", ".md": "text/markdown", ".txt": "text/plain", ".png": "image/png"}
_CONTENT = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in (_ANY, *_TYPES.values())}
_ETAG = {"ETag": {"description": "the SHA-256 of the file, in quotation marks", "schema": {"type": "string"}}}
_RANGE_SENT = {"Content-Range": {"description": "which bytes, of how many", "schema": {"type": "string"}}}

ArtifactName = Annotated[
    str, PathParameter(description="a name from the list, such as `model/adapter_model.safetensors`")
]


class ArtifactResource(BaseModel):
    """A file of a job."""

    name: str
    bytes: int
    sha256: str = Field(description="in hexadecimal digits; it is also the `ETag` of the file")
    media_type: str


class ArtifactList(BaseModel):
    """What a job has left, by name."""

    artifacts: list[ArtifactResource]


class _SentArtifact(FileResponse):
    """Sends a file. Raises ``gone`` if it was deleted before its first byte was read: nothing has been sent by then."""

    def __init__(self, *arguments: Any, gone: ArtifactNotFound, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._gone = gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""
        waiting: list[Message] = []

        async def send_with_bytes(message: Message) -> None:
            if message["type"] == "http.response.start":
                waiting.append(message)
                return
            while waiting:
                await send(waiting.pop())
            await send(message)

        try:
            await super().__call__(scope, receive, send_with_bytes)
        except FileNotFoundError:
            raise self._gone from None


@router.get("/{job}/artifacts")
def list_artifacts(job: str, jobs: Jobs, service: WithService) -> ArtifactList:
    """The artifacts of a job: its stacks as PEFT folders with model cards, its report and plots, and its partition."""
    shown = []
    for name, path in _found(jobs, job, service.folder_of).items():
        try:
            one = artifact(name, path)
        except FileNotFoundError:  # it was deleted meanwhile
            continue
        shown.append(ArtifactResource(name=name, bytes=one.bytes, sha256=one.sha256, media_type=_type(name)))
    return ArtifactList(artifacts=shown)


@router.get(
    "/{job}/artifacts/{name:path}",
    response_class=FileResponse,
    responses={
        200: {"content": _CONTENT, "headers": _ETAG, "description": "The file"},
        206: {
            "content": _CONTENT,
            "headers": _ETAG | _RANGE_SENT,
            "description": "The part of it that `Range` asks for",
        },
        416: {
            "content": {MEDIA_TYPE: {"schema": _PROBLEM}},
            "headers": _RANGE_SENT,
            "description": "It has no such part",
        },
        304: {"headers": _ETAG, "description": "It is the one that `If-None-Match` names"},
    },
)
def get_artifact(
    job: str, name: ArtifactName, request: Request, jobs: Jobs, service: WithService,
    if_none_match: Annotated[str | None, Header(description="an `ETag` of the file, which is then not sent again")] = None,
) -> Response:  # fmt: skip
    """An artifact; with `Range` a part of it. `ETag` is its SHA-256."""
    path = _found(jobs, job, service.folder_of).get(name)
    if path is None:
        raise ArtifactNotFound(job, name)
    try:
        one, state = artifact(name, path), path.stat()
    except FileNotFoundError:
        raise ArtifactNotFound(job, name) from None
    headers = {"ETag": f'"{one.sha256}"'}
    if if_none_match is not None and headers["ETag"] in if_none_match:
        return Response(status_code=304, headers=headers)
    _check_range(request, headers["ETag"], one.bytes)
    return _SentArtifact(
        path, media_type=_type(name), headers=headers, stat_result=state, gone=ArtifactNotFound(job, name)
    )


def _check_range(request: Request, tag: str, size: int) -> None:
    """Refuse a part that the file does not have. A range of another form than `bytes=1-2`, `1-` or `-2` is not looked at.

    Raises:
        HTTPException: 416, if there is no such part.
    """
    given = request.headers.get("range")
    if given is None or request.headers.get("if-range", tag) != tag:
        return
    match = _RANGE.fullmatch(given)
    first, last = match.groups() if match else ("", "")
    if match is None or (first and last and int(last) < int(first)) or not (first or last):
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    elif (first and int(first) >= size) or (not first and int(last) == 0):
        detail = f"the file has {size} bytes; the range {given} is none of them"
        raise HTTPException(416, detail, {"Content-Range": f"bytes */{size}"})


def _found(jobs: JobStore, job: str, folder_of: Callable[[str], Path] | None) -> dict[str, Path]:
    if folder_of is None:
        raise HTTPException(404, "this service keeps no artifacts")
    record = jobs.get(job)
    folder = folder_of(record.id)
    if record.status == "succeeded":
        ensure_report(jobs, record, folder)
    finished = jobs.newest(record.id, "finished")
    return names_of(folder, record.status in FINISHED, finished.data if finished else None)


def _type(name: str) -> str:
    return _TYPES.get(Path(name).suffix, _ANY)
