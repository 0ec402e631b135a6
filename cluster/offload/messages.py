"""What the owner of an evaluation, the actor of its run, and the run's workers tell one another. Nothing here loads torch."""

from dataclasses import dataclass
from typing import Any

OFFLOAD = "(offload)"  # in a job's scratch folder
START_SECONDS = 180.0  # until the workers are there: a machine may have to be made for them


@dataclass(frozen=True)
class RunSpec:
    """What a run is made of."""

    name: str  # of it, and of its folder
    workers: int
    memory: int  # bytes that a worker is planned to take
    work: list[Any]  # a reference to what the workers are told; in a list Ray leaves it as it is


@dataclass(frozen=True)
class EvaluationOrder:
    """A stack to be judged: the ``number``-th of the run, its tensors behind a reference in a list; None ends the run."""

    number: int
    stack: list[Any] | None
    examples: str


@dataclass(frozen=True)
class RunState:
    """How far a run is: ``shares`` of the present order, by worker, pickled; ``over`` is why it ended, if it has.

    ``done`` is what the workers did together: layers that they loaded, until the model is ``loaded``; then an order's batches.
    """

    shares: dict[int, bytes]
    over: str | None
    started: bool
    loaded: bool
    done: int
    silent_seconds: float


@dataclass(frozen=True)
class Reason:
    """Why a worker ended; ``lost_another`` if it noticed no more than that another one was gone."""

    words: str
    lost_another: bool
