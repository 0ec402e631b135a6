"""What a job leaves."""

from pydantic import BaseModel, Field


class ArtifactResource(BaseModel):
    """A file of a job."""

    name: str
    bytes: int
    sha256: str = Field(description="in hexadecimal digits; it is also the `ETag` of the file")
    media_type: str


class ArtifactList(BaseModel):
    """What a job has left, by name."""

    artifacts: list[ArtifactResource]
