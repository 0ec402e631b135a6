"""Uploads: files with rows that tenants send."""

from pydantic import BaseModel, Field

from chainfed_ray.api.schemas.bodies import RequestBody, example

_FORMS = (
    r"^[^/\\\x00-\x1f\x7f]{1,200}\.(csv|tsv|jsonl|ndjson|json|parquet|csv\.gz|tsv\.gz|jsonl\.gz|ndjson\.gz|json\.gz)$"
)
_SHA256 = r"^[0-9a-f]{64}$"
_EXAMPLE_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


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


class UploadPage(BaseModel):
    """A page of uploads, the newest first."""

    uploads: list[UploadResource]
    next: str | None = Field(description="pass this as `cursor` to get the next page; null on the last page")
