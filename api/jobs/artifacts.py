"""Routes of a job's artifacts: what it leaves for people to have."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, HTTPException, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse

from chainfed_ray.api.jobs.etags import IfNoneMatch, is_known
from chainfed_ray.api.jobs.report import ensure_report
from chainfed_ray.api.rest.errors import MEDIA_TYPE
from chainfed_ray.api.rest.files import IfRange, Range, SentFile
from chainfed_ray.api.rest.job_file import StrictRoute
from chainfed_ray.api.rest.service import Jobs, WithService
from chainfed_ray.api.schemas.artifacts import ArtifactList, ArtifactResource
from chainfed_ray.cluster.files.artifacts import artifact, names_of
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.errors import ArtifactNotFound
from chainfed_ray.records.states import FINISHED

router = APIRouter(prefix="/v1/jobs", tags=["artifacts"], route_class=StrictRoute)

_PROBLEM = {"$ref": "#/components/schemas/ProblemDetails"}
_ANY = "application/octet-stream"
_TYPES = {".json": "application/json", ".md": "text/markdown", ".txt": "text/plain", ".png": "image/png"}
_CONTENT = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in (_ANY, *_TYPES.values())}
_ETAG = {"ETag": {"description": "the SHA-256 of the file, in quotation marks", "schema": {"type": "string"}}}
_RANGE_SENT = {"Content-Range": {"description": "which bytes, of how many", "schema": {"type": "string"}}}

ArtifactName = Annotated[
    str, PathParameter(description="a name from the list, such as `model/adapter_model.safetensors`")
]


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
    job: str, name: ArtifactName, jobs: Jobs, service: WithService,
    if_none_match: IfNoneMatch = None, part: Range = None, still: IfRange = None,
) -> Response:  # fmt: skip
    """An artifact; with `Range` a part of it. `ETag` is its SHA-256."""
    gone = ArtifactNotFound(job, name)
    path = _found(jobs, job, service.folder_of).get(name)
    if path is None:
        raise gone
    try:
        tag = f'"{artifact(name, path).sha256}"'
        sent = SentFile(path, _type(name), gone, tag)
    except FileNotFoundError:
        raise gone from None
    if is_known(tag, if_none_match):
        return Response(status_code=304, headers={"ETag": tag, "Cache-Control": sent.headers["Cache-Control"]})
    return sent


router.add_api_route("/{job}/artifacts/{name:path}", get_artifact, methods=["HEAD"], include_in_schema=False)


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
