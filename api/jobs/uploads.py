"""Routes of uploads: files with rows that tenants send for their jobs to read."""

from typing import Annotated

from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from chainfed_ray.api.rest.job_file import StrictRoute
from chainfed_ray.api.rest.service import Caller, CallerGone, Uploads, WithService
from chainfed_ray.api.schemas.uploads import NewUpload, UploadPage, UploadResource
from chainfed_ray.cluster.files.upload_bytes import Arriving
from chainfed_ray.cluster.files.uploads import Upload
from chainfed_ray.cluster.queries.pages import Place
from chainfed_ray.cluster.storage import UPLOAD_BYTES
from chainfed_ray.errors import PartUnavailable
from chainfed_ray.reading import OF_DISKS

router = APIRouter(prefix="/v1/uploads", tags=["uploads"], route_class=StrictRoute)

_BINARY = "application/octet-stream"
_WRITTEN_BYTES = 2**20  # are written together
_RETRY_SECONDS = 30

UploadId = Annotated[str, Path(pattern="^[0-9a-f]{16}$", description="the id of an upload")]


@router.post("", status_code=201)
def begin_upload(
    body: NewUpload, response: Response, uploads: Uploads, service: WithService, caller: Caller
) -> UploadResource:
    """Begin an upload. One of the same name and SHA-256 is given again, with the bytes that have arrived of it."""
    if body.bytes > service.upload_bytes:
        raise HTTPException(
            413, f"an upload has {service.upload_bytes} bytes at most ({UPLOAD_BYTES}); this one has {body.bytes}"
        )
    limits = (service.stored_bytes, service.most_uploads) if caller.key else (None, None)
    found = uploads.begin(body.name, body.bytes, body.sha256, *limits)
    response.headers["Location"] = f"/v1/uploads/{found.id}"
    return _resource(found)


@router.get("")
def list_uploads(
    uploads: Uploads,
    limit: Annotated[int, Query(ge=1, le=1000, description="the most uploads of a page")] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next` of the page before")] = None,
) -> UploadPage:
    """The uploads, the newest first."""
    found = uploads.page(limit + 1, None if cursor is None else Place.parse(cursor))
    shown = found[:limit]
    following = Place(shown[-1].created_at, shown[-1].id).cursor() if len(found) > limit else None
    return UploadPage(uploads=[_resource(upload) for upload in shown], next=following)


@router.get("/{upload}")
def get_upload(upload: UploadId, uploads: Uploads) -> UploadResource:
    """An upload, with how many of its bytes have arrived."""
    return _resource(uploads.get(upload))


@router.put(
    "/{upload}/content",
    openapi_extra={
        "requestBody": {"required": True, "content": {_BINARY: {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def put_content(
    upload: UploadId,
    request: Request,
    uploads: Uploads,
    offset: Annotated[int, Query(ge=0, lt=2**50, description="how many bytes come before these")] = 0,
) -> UploadResource:
    """Send all bytes of an upload from `offset` on, or a piece of them. What has arrived stays if the request is cut off."""
    try:
        file = await run_in_threadpool(uploads.receive, upload, offset)
        try:
            await _write(request, file)
            found = await run_in_threadpool(uploads.finish, upload, file)
        finally:
            await run_in_threadpool(file.close)
    except ClientDisconnect:
        raise CallerGone from None
    except OSError as error:
        if error.errno not in OF_DISKS:
            raise
        raise PartUnavailable("the storage", f"does not take the bytes ({error.strerror})", _RETRY_SECONDS) from error
    return _resource(found)


def _resource(upload: Upload) -> UploadResource:
    return UploadResource.model_validate(upload, from_attributes=True)


async def _write(request: Request, file: Arriving) -> None:
    """Append the body to ``file``, a little at a time, however much it is."""
    waiting = bytearray()
    try:
        async for part in request.stream():
            waiting += part
            if len(waiting) >= _WRITTEN_BYTES:
                whole, waiting = bytes(waiting), bytearray()
                await run_in_threadpool(file.append, whole)
    finally:  # also of a request that is cut off
        if waiting:
            await run_in_threadpool(file.append, bytes(waiting))


@router.delete("/{upload}", status_code=204, response_class=Response)
def delete_upload(upload: UploadId, uploads: Uploads) -> None:
    """Delete an upload. 409 if a job that is not over reads it."""
    uploads.delete(upload)
