"""The events of a job, and its log."""

from typing import Any

from pydantic import BaseModel, Field

from chainfed_ray.records.log_line import LogLine


class EventResource(BaseModel):
    """An event of a job."""

    seq: int = Field(description="the event's number, counted from 1")
    kind: str = Field(description="`started`, `round`, `finished`, or the new status of the job")
    at: str = Field(description="ISO 8601, UTC")
    data: dict[str, Any]


class EventPage(BaseModel):
    """A page of events, the oldest first."""

    events: list[EventResource]
    last: int = Field(description="pass this as `after` to get the events that follow")
    finished: bool = Field(description="true if the job is over and no events follow")


class LogPage(BaseModel):
    """A page of a job's log, the oldest lines first."""

    lines: list[LogLine]
    next: int = Field(description="pass this as `after` to get the next page")
    finished: bool = Field(description="true if the job is over and these are its last lines")
