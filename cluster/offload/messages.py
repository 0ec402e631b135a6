"""The messages between an evaluation's owner (the coordinator), the actor of its run, and the run's workers.

Nothing here imports torch, because the actor works without it.
"""

from dataclasses import dataclass
from typing import Any

OFFLOAD = "(offload)"  # the folder for layers on disk, inside a job's scratch folder
START_SECONDS = 180.0  # the longest that workers may take to start: the cluster may have to add a machine for them


@dataclass(frozen=True)
class RunSpec:
    """The settings of a run."""

    name: str  # also the name of the run's folder
    workers: int
    memory: int  # bytes that a worker is planned to take above the idle process
    work: list[Any]  # a reference to a `worker.Work`; it is in a list, or Ray would fetch it for the actor too


@dataclass(frozen=True)
class EvaluationOrder:
    """An order to the workers: evaluate a stack, or end the run."""

    number: int  # counts the orders of a run from 1
    stack: list[Any] | None  # a list with a reference to the stack's tensors; None ends the run
    examples: str  # the name of the set of held-out examples


@dataclass(frozen=True)
class RunState:
    """How far a run is."""

    results: dict[int, bytes]  # for the present order: each worker's result by rank, pickled
    over: str | None  # why the run ended; None if it has not
    started: bool  # a worker has started
    loaded: bool  # a worker has loaded the model
    done: int  # until the model is loaded: layers loaded by all workers together; then batches of the present order
    silent_seconds: float  # since a worker last reported progress


@dataclass(frozen=True)
class Reason:
    """Why a worker ended."""

    words: str
    peer_failed: bool  # it ended only because its connection to another worker broke
