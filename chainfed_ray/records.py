"""What a job leaves on record: an ``Opening``, a ``Round`` for each round, and an ``Ending``.

They are what the commit log keeps, what the service reports and what the command line prints. All JSON.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """An immutable JSON document."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Admitted(Record):
    """A client that takes part, and the plan of its turns."""

    client: str
    client_class: str
    examples: int
    budget_bytes: int
    planned_bytes: int
    micro_batch: int


class LeftOut(Record):
    """A client that cannot take part."""

    client: str
    client_class: str
    budget_bytes: int
    lacking_bytes: int
    reason: str


class Opening(Record):
    """Before the first round: who takes part, and where the chain starts."""

    admitted: tuple[Admitted, ...]
    left_out: tuple[LeftOut, ...]
    layers: int
    start_layer: int
    similarities: tuple[float, ...]
    stages: int
    total_rounds: int


class Turn(Record):
    """A client's part in a round that counted."""

    client: str
    client_class: str
    examples: int
    loss: float
    seconds: float
    planned_bytes: int
    peak_bytes: int | None
    sent_bytes: int


class Lost(Record):
    """A client's turn that did not count, and why."""

    client: str
    client_class: str
    reason: str


class Round(Record):
    """One federated round. ``ended`` says why its stage ended with it, if it did."""

    index: int
    stage: int
    bottom: int
    top: int
    turns: tuple[Turn, ...]
    lost: tuple[Lost, ...]
    counted: bool
    train_loss: float | None
    held_out_loss: float | None
    accuracy: float | None
    movement: float | None
    ended: str | None
    seconds: float


class Ending(Record):
    """After the last round: the test accuracy of the whole chain."""

    status: Literal["succeeded"] = "succeeded"
    accuracy: float
    loss: float
    rounds: int
    peak_bytes: dict[str, int]
