"""The ``Forecast`` of a job: the result of a dry run, as a JSON document."""

from typing import Literal

from pydantic import Field

from chainfed_ray.budget.footprint import WeightPlacement
from chainfed_ray.chain import LookAhead
from chainfed_ray.record import Document, Record

PREFIX = "prefix"  # the name of a part of the plan that ``Footprint`` does not have


class ClassForecast(Record):
    """The forecast for the clients of one class.

    Bytes are those of a single client, the highest of the class. Pairs are the lowest and the highest of the class. If no
    client of the class fits, the figures are of the plan it would get with ``shortfall_bytes`` more.
    """

    name: str
    clients: int
    joins: int
    excluded: int
    shortfall_bytes: int
    budget_bytes: int
    planned_bytes: int
    parts: dict[str, int] = Field(
        description="the bytes of the largest plan by part; `prefix` is what running the layers below the window takes "
        "beyond a training step"
    )
    window: tuple[int, int]
    micro_batch: tuple[int, int]
    weights: tuple[WeightPlacement, ...]
    activations_offloaded: int = Field(
        description="the number of joining clients that offload saved activations to disk"
    )
    activations_recomputed: int = Field(
        description="the number of joining clients that compute saved activations again in the backward pass"
    )
    cached: int = Field(description="the number of joining clients that cache the prefix on disk")
    disk_bytes: int
    sent_bytes: int = Field(description="the bytes sent in a turn of the first stage")
    micro_step_seconds: float | None = Field(
        description="the measured time of one micro-batch; null if nothing would be trained"
    )


class Change(Record):
    """The effect of a single change of the job on who can join."""

    field: str
    value: int | str
    joins: int = Field(description="the number of clients that would take part")
    joins_delta: int
    words: str


class LookAheadForecast(Record):
    """What the job would cost with one look-ahead."""

    look_ahead: LookAhead
    window: int = Field(description="the layers trained together; all of the model's in the last row")
    own: bool = Field(description="true for the look-ahead that the job has")
    joins: int = Field(description="the number of clients that would take part")
    whole: int = Field(description="how many of these would train the whole window")
    layer_passes: float = Field(
        description="how often an example passes through a layer in a training step, on average: forward, backward, and once "
        "more where activations are computed again"
    )
    planned_bytes: dict[str, int] = Field(
        description="the planned bytes of memory by class; without those that do not join"
    )
    estimated_seconds: float | None = Field(
        description="the job's longest duration, computed from the steps that were measured for the job's own look-ahead"
    )


class Forecast(Document):
    """The forecast of a job. ``refused`` gives the reason if the job would not be accepted, and is null if it would."""

    job: str
    base: str
    layers: int
    start: Literal["auto", "best-exit", "last"] | int = Field(
        description="the chain's lowest layer; with `auto` or `best-exit` it is found when the job runs, and this forecast is "
        "planned from layer 0"
    )
    window: int = Field(description="the widest window that the job allows and some client's budget holds")
    clients: int
    joins: int
    quorum: int
    refused: str | None
    rounds: int = Field(
        description="the most rounds that the job may have: `rounds.total`, or fewer if its limit of ε allows fewer"
    )
    stopped: str | None = Field(description="why `rounds` is less than the job asks for; null if it is not")
    clients_per_round: int
    sent_bytes_per_round: int = Field(
        description="the bytes that the answering clients of a round send together, on average"
    )
    head_sums_bytes: int = Field(
        description="the most bytes that each client sends each time a head is fitted in closed form: in each stage, or once "
        "with the schedule `cyclic`; 0 if no head is fitted"
    )
    received_bytes: int = Field(description="the bytes that a client receives in a turn: the whole stack")
    exits_bytes: int = Field(
        description="the bytes that the job's early exits take in the service's storage, if each of its stages leaves one; "
        "0 if it keeps none"
    )
    estimated_seconds: float | None = Field(
        description="an estimate of the job's longest duration on this machine, from measured steps; null if nothing would be "
        "trained"
    )
    classes: tuple[ClassForecast, ...] = Field(description="the classes of clients, the smallest budget first")
    changes: tuple[Change, ...]
    look_aheads: tuple[LookAheadForecast, ...] = Field(
        (), description="what the job would cost with each `chain.look_ahead`, and with all layers in one window"
    )
