"""Jobs: in lists, in full with their progress, and their clients."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from chainfed_ray.activity import Activity
from chainfed_ray.records.fleet import AdmittedClients, FleetClient, Weights
from chainfed_ray.records.rounds import JobStarted, Round, Turn
from chainfed_ray.records.states import Status

ConditionType = Literal["Validated", "Running", "Paused", "Finished"]
Truth = Literal["True", "False", "Unknown"]


class Condition(BaseModel):
    """Something that is true of a job, or is not."""

    type: ConditionType = Field(
        description="`Validated`: its model, rows and clients can be trained; `Running`: it trains; `Paused`; `Finished`"
    )
    status: Truth
    reason: str = Field(description="why, in one word for programs; of a job that failed the type of its error")
    since: str = Field(description="since when `status` is what it is: ISO 8601, UTC")


class ClassMemory(BaseModel):
    """A class of clients in the newest round. If it had no turn there, the values are its plans for the first stage."""

    budget: int = Field(description="memory that a client declared, in bytes")
    planned: int = Field(description="the largest planned memory of a turn, in bytes")
    peak: int | None = Field(description="the largest measured memory of a turn, in bytes; null if none was measured")
    window: int = Field(description="the fewest adapters that a client trains together")
    micro_batch: int = Field(description="the fewest examples that a client holds at a time")
    weights: Weights = Field(
        description="`resident`: all clients hold whole layers in memory; `streamed`: some stream a layer's matrices"
    )
    activations_offloaded: bool = Field(description="true if some client keeps saved activations on disk")
    activations_recomputed: bool = Field(
        description="true if some client computes saved activations again in the backward pass"
    )

    @classmethod
    def of(
        cls, members: Sequence[AdmittedClients] | Sequence[Turn], windows: Iterable[int], peaks: Iterable[int]
    ) -> Self:
        """Sum up the plans or turns of a class's clients, with the ``windows`` they train and their measured ``peaks``."""
        return cls(
            budget=members[0].budget_bytes,
            planned=max(member.planned_bytes for member in members),
            peak=max(peaks, default=None),
            window=min(windows),
            micro_batch=min(member.micro_batch for member in members),
            weights="streamed" if any(member.weights == "streamed" for member in members) else "resident",
            activations_offloaded=any(member.activations_offloaded for member in members),
            activations_recomputed=any(member.activations_recomputed for member in members),
        )


class JobProgress(BaseModel):
    """How far a job is, after its newest round."""

    round: int = Field(description="finished rounds")
    total_rounds: int = Field(description="the most rounds that the job may have")
    stage: int = Field(description="the present stage, counted from 1")
    stages: int
    bottom: int = Field(description="the window's lowest layer, counted from 0")
    top: int = Field(description="the window's highest layer, counted from 0")
    layers: int = Field(description="layers of the base model")
    clients: int = Field(description="clients that take part in the job")
    excluded: int = Field(description="clients whose budget is too small for any window")
    done: int = Field(description="clients whose update counted in the newest round")
    exceeded: int = Field(description="how many of the `done` clients exceeded their plan and ran their turn again")
    failed_turns: int = Field(description="turns that failed in the newest round")
    accuracy: float | None = Field(description="validation accuracy after the newest round; null if not measured")
    fraction: float = Field(
        description="finished rounds in the most that there may be, from 0 to 1; 1 of a job that succeeded, which may have "
        "had fewer"
    )
    memory: dict[str, ClassMemory] = Field(description="memory by class of clients")

    @classmethod
    def of(cls, job_started: JobStarted, newest: Round | None, is_done: bool = False) -> "JobProgress":
        """The progress after ``newest``, or before the first round if that is None."""
        return cls(
            round=newest.index + 1 if newest else 0,
            total_rounds=job_started.total_rounds,
            stage=newest.stage + 1 if newest else 1,
            stages=job_started.stages,
            bottom=newest.bottom if newest else job_started.start_layer,
            top=newest.top if newest else job_started.start_layer + job_started.window - 1,
            layers=job_started.layers,
            clients=job_started.taking_part,
            excluded=job_started.left_out,
            done=len(newest.turns) if newest else 0,
            exceeded=sum(turn.exceeded is not None for turn in newest.turns) if newest else 0,
            failed_turns=len(newest.failed_turns) if newest else 0,
            accuracy=newest.accuracy if newest else None,
            fraction=1.0 if is_done else (newest.index + 1 if newest else 0) / max(1, job_started.total_rounds),
            memory={name: _class_memory(name, job_started, newest) for name in _classes(job_started)},
        )


class JobSummary(BaseModel):
    """A job in a list."""

    id: str
    name: str
    tenant: str = Field(description="whose job it is: the owner of the key that it was submitted with")
    status: Status
    model: str = Field(description="the name under which the model is served, once the job has succeeded")
    submitted_at: str = Field(description="ISO 8601, UTC")
    started_at: str | None
    finished_at: str | None
    accuracy: float | None = Field(description="accuracy on the test rows, once the job has succeeded")
    labels: dict[str, str]
    priority: int = Field(description="of a tenant's jobs that wait, those with a greater one begin first")


class JobResource(JobSummary):
    """A job in full."""

    activity: Activity | None = Field(
        description="what the job is doing; null unless it is validating, running or pausing"
    )
    progress: JobProgress | None = Field(description="how far the job is; null until the chain's start is known")
    estimated_finish: str | None = Field(
        description="when the job ends if it has all its rounds, and these take as long as the newest ones: ISO 8601, UTC; "
        "null unless it is running and has finished a round"
    )
    conditions: list[Condition] = Field(description="what is true of the job, why, and since when")
    result: dict[str, Any] | None = Field(description="the result, once the job has succeeded")
    error: dict[str, Any] | None = Field(
        description="why the job failed: `type`, `message`, if known the fields as `problems`, and as `cause` what first went "
        "wrong: `client`, `stage`, `round`, `message`"
    )
    spec: dict[str, Any] = Field(description="the job file with every default filled in")


class JobPage(BaseModel):
    """A page of jobs, the newest first."""

    jobs: list[JobSummary]
    next: str | None = Field(description="pass this as `cursor` to get the next page; null on the last page")


class ClientPage(BaseModel):
    """A page of a job's clients: those that take part, in the order of the fleet, the others, and those that came later."""

    clients: list[FleetClient]
    next: int | None = Field(description="pass this as `after` to get the next page; null on the last page")


def _classes(job_started: JobStarted) -> list[str]:
    return list(dict.fromkeys(client.client_class for client in job_started.admitted))


def _class_memory(name: str, job_started: JobStarted, newest: Round | None) -> ClassMemory:
    """The memory of the class ``name`` by its turns in the newest round; if it had none, by the plans of its clients."""
    turns = [turn for turn in newest.turns if turn.client_class == name] if newest else []
    if newest and turns:
        peaks = [turn.peak_bytes for turn in turns if turn.peak_bytes is not None]
        return ClassMemory.of(turns, [newest.top - turn.bottom + 1 for turn in turns], peaks)
    clients = [client for client in job_started.admitted if client.client_class == name]
    return ClassMemory.of(clients, [client.window for client in clients], [])
