"""A line of a job's log, as it is kept and as it is told."""

from pydantic import BaseModel, ConfigDict, Field


class LogLine(BaseModel):
    """A line of a job's log."""

    model_config = ConfigDict(frozen=True)

    at: str = Field(description="ISO 8601, UTC")
    level: str = Field(description="`info`, `warning` or `error`")
    source: str = Field(description="`coordinator`, or a client by its name")
    round: int | None = Field(None, description="the round that it is about, counted from 1")
    message: str
