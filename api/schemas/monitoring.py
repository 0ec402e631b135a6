"""The health of the service, and its audit log."""

from typing import Literal

from pydantic import BaseModel, Field

from chainfed_ray.api.schemas.bodies import example


class Health(BaseModel):
    """The health of the service and of each of its parts."""

    model_config = example({"status": "ok", "checks": {"database": "ok", "storage": "ok"}})

    status: Literal["ok", "unavailable"]
    checks: dict[str, str] = Field(description="for each part `ok`, or why it does not work")


class AuditEntry(BaseModel):
    """Something that was changed, or refused."""

    number: int
    at: str = Field(description="ISO 8601, UTC")
    tenant: str | None = Field(description="whose key the request had; null if it had none that is valid")
    key: str | None = Field(description="the id of the key; null if there was none")
    action: str = Field(description="a route, or a command of the operator's")
    target: str = Field(description="the path of the request, or of what it made")
    address: str = Field(description="where the request came from")
    outcome: str = Field(description="the status of the answer; `done` for a command")
    request: str | None = Field(description="the id of the request, which the service's log has as well")


class AuditPage(BaseModel):
    """A page of the audit log."""

    entries: list[AuditEntry]
    next: int | None = Field(description="`before` of the next page; null on the last one")
