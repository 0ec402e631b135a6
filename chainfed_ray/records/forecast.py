"""What a dry run tells of a job: a ``Forecast``. All JSON, as what a job leaves on record is."""

from typing import Literal

from pydantic import Field

from chainfed_ray.budget.planner import WeightPlacement
from chainfed_ray.record import Document, Record

PREFIX = "prefix"  # a part beside those of the footprint


class ClassForecast(Record):
    """The clients of one class. Bytes are a client's, the most of any; ranges are the least and the most.

    Where nobody joins, the plan is the one with the bytes that are lacking.
    """

    name: str
    clients: int
    joins: int
    excluded: int
    shortfall_bytes: int
    budget_bytes: int
    planned_bytes: int
    parts: dict[str, int] = Field(
        description="of the largest plan; `prefix` is what running the layers below takes beyond a step"
    )
    window: tuple[int, int]
    micro_batch: tuple[int, int]
    weights: tuple[WeightPlacement, ...]
    activations_offloaded: int = Field(description="how many of those who join keep saved activations on disk")
    cached: int = Field(description="how many of those who join keep their prefix on disk")
    disk_bytes: int
    sent_bytes: int = Field(description="in a turn of the first stage")
    micro_step_seconds: float | None = Field(
        description="of one micro-batch, as it was measured; null if nothing would be trained"
    )


class Change(Record):
    """What one change of the job would buy."""

    field: str
    value: int | str
    joins: int = Field(description="clients that would take part")
    joins_delta: int
    words: str


class Forecast(Document):
    """A job before it is trained. ``refused`` says why it would not be accepted; null if it would."""

    job: str
    base: str
    layers: int
    start: Literal["auto", "best-exit"] | int = Field(
        description="`auto` or `best-exit`: found when the job runs; here the chain is planned from 0"
    )
    window: int = Field(description="the widest that the job allows and a client's budget holds")
    clients: int
    joins: int
    quorum: int
    refused: str | None
    rounds: int = Field(
        description="at most: as many as the job asks for or, if those are fewer, as its limit of ε allows"
    )
    stopped: str | None = Field(description="why there are fewer rounds than the job asks for; null if there are not")
    clients_per_round: int
    sent_bytes_per_round: int = Field(description="by the clients of a round that answer, on average")
    head_sums_bytes: int = Field(
        description="by each client each time that a head is fitted in closed form, at most: for each stage, or, where "
        "windows take turns, once; 0 without one"
    )
    received_bytes: int = Field(description="by a client in a turn: the whole stack")
    estimated_seconds: float | None = Field(
        description="at most, on this machine: an estimate from steps that were measured; null if nothing would be trained"
    )
    classes: tuple[ClassForecast, ...] = Field(description="the smallest budget first")
    changes: tuple[Change, ...]
