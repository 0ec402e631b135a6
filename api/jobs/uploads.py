"""Routes of uploads: files with rows that tenants send for their jobs to read."""

from typing import Annotated

from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from chainfed_ray.api.rest.job_file import StrictRoute
from chainfed_ray.api.rest.schemas import RequestBody, example
from chainfed_ray.api.rest.service import Caller, CallerGone, Uploads, WithService
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
_FORMS = (
    r"^[^/\\\x00-\x1f\x7f]{1,200}\.(csv|tsv|jsonl|ndjson|json|parquet|csv\.gz|tsv\.gz|jsonl\.gz|ndjson\.gz|json\.gz)$"
)
_SHA256 = r"^[0-9a-f]{64}$"
_EXAMPLE_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

UploadId = Annotated[str, Path(pattern="^[0-9a-f]{16}$", description="the id of an upload")]


class NewUpload(RequestBody):
    """A file that will be sent."""

    model_config = example({"name": "rows.csv", "bytes": 25_600, "sha256": _EXAMPLE_DIGEST})

    name: str = Field(
        pattern=_FORMS, description="what it is called; the end says the form, such as `.csv` or `.jsonl.gz`"
    )
    bytes: int = Field(ge=1, lt=2**50, description="how many bytes it has")
    sha256: str = Field(pattern=_SHA256, description="the SHA-256 of its bytes, in hexadecimal digits")


class UploadResource(BaseModel):
    """An upload. A job reads it as `upload:<id>` once it is complete."""

    model_config = example(
        {
            "id": "0a1b2c3d4e5f6071",
            "tenant": "search",
            "name": "rows.csv",
            "bytes": 25_600,
            "sha256": _EXAMPLE_DIGEST,
            "received": 25_600,
            "complete": True,
            "created_at": "2026-03-01T12:00:00.000000+00:00",
        }
    )

    id: str
    tenant: str = Field(description="whose upload it is: the owner of the key that it was begun with")
    name: str
    bytes: int = Field(description="how many bytes it has when it is complete")
    sha256: str
    received: int = Field(description="how many bytes are here: the offset of the next piece")
    complete: bool = Field(description="true once all bytes are here and have the SHA-256")
    created_at: str = Field(description="ISO 8601, UTC")

    @classmethod
    def of(cls, upload: Upload) -> "UploadResource":
        """The resource of an upload."""
        return cls.model_validate(upload, from_attributes=True)


class UploadPage(BaseModel):
    """A page of uploads, the newest first."""

    uploads: list[UploadResource]
    next: str | None = Field(description="pass this as `cursor` to get the next page; null on the last page")


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
    return UploadResource.of(found)


@router.get("")
def list_uploads(
    uploads: Uploads,
    limit: Annotated[int, Query(ge=1, le=1000, description="the most uploads of a page")] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next` of the page before")] = None,
) -> UploadPage:
    """The uploads, the newest first."""
    found = uploads.page(limit + 1, None if cursor is None else Place.parse(cursor))
    shown = found[:limit]
    following = shown[-1].place.cursor() if len(found) > limit else None
    return UploadPage(uploads=[UploadResource.of(upload) for upload in shown], next=following)


@router.get("/{upload}")
def get_upload(upload: UploadId, uploads: Uploads) -> UploadResource:
    """An upload, with how many of its bytes have arrived."""
    return UploadResource.of(uploads.get(upload))


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
    return UploadResource.of(found)


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
