"""The resources of the REST API, version 1: what goes over the wire, and nothing else."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from chainfed_ray.activity import Activity
from chainfed_ray.budget.planner import WeightPlacement
from chainfed_ray.cluster.jobs.store import JobRecord
from chainfed_ray.records.rounds import AdmittedClient, JobStarted, Round, Turn

ModelTask = Literal["sequence-classification", "causal-lm"]
JobStatus = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


class ClassMemory(BaseModel):
    """A client class in the newest round; where it had no turn in it, as it is planned for the first stage."""

    budget: int = Field(description="bytes that a client declared")
    planned: int = Field(description="the most bytes that a turn was planned to take")
    peak: int | None = Field(description="the most bytes that a turn took; null where none was measured")
    window: int = Field(description="adapters that a client trains together, at least")
    micro_batch: int = Field(description="examples that a client holds at a time, at least")
    weights: WeightPlacement = Field(
        description="`layer`: whole layers are loaded; `matrix`: some client streams them by matrices"
    )
    activations_offloaded: bool = Field(description="whether some client keeps saved activations on disk")

    @classmethod
    def of(
        cls, members: Sequence[AdmittedClient] | Sequence[Turn], windows: Iterable[int], peaks: Iterable[int]
    ) -> Self:
        """The class of clients that have these plans or turns."""
        return cls(
            budget=members[0].budget_bytes,
            planned=max(member.planned_bytes for member in members),
            peak=max(peaks, default=None),
            window=min(windows),
            micro_batch=min(member.micro_batch for member in members),
            weights="streamed" if any(member.weights == "streamed" for member in members) else "resident",
            activations_offloaded=any(member.activations_offloaded for member in members),
        )


class JobProgress(BaseModel):
    """How far a job is, after its newest round."""

    round: int = Field(description="rounds done")
    total_rounds: int
    stage: int = Field(description="counted from 1")
    stages: int
    bottom: int = Field(description="the window's lowest layer, counted from 0")
    top: int
    layers: int
    clients: int = Field(description="clients that take part in the job")
    excluded: int = Field(description="clients whose budget is too small for any window")
    done: int = Field(description="clients whose update counted in the newest round")
    exceeded: int = Field(description="of those, clients that exceeded their plan and took their turn again")
    failed_turns: int
    accuracy: float | None = Field(description="on the validation rows")
    memory: dict[str, ClassMemory]

    @classmethod
    def of(cls, job_started: JobStarted, newest: Round | None) -> "JobProgress":
        """The progress that the newest round, if there is any, has made."""
        return cls(
            round=newest.index + 1 if newest else 0,
            total_rounds=job_started.total_rounds,
            stage=newest.stage + 1 if newest else 1,
            stages=job_started.stages,
            bottom=newest.bottom if newest else job_started.start_layer,
            top=newest.top if newest else job_started.start_layer + job_started.window - 1,
            layers=job_started.layers,
            clients=len(job_started.admitted),
            excluded=len(job_started.excluded),
            done=len(newest.turns) if newest else 0,
            exceeded=sum(turn.exceeded is not None for turn in newest.turns) if newest else 0,
            failed_turns=len(newest.failed_turns) if newest else 0,
            accuracy=newest.accuracy if newest else None,
            memory={name: _class_memory(name, job_started, newest) for name in _classes(job_started)},
        )


class JobSummary(BaseModel):
    """A job in a list."""

    id: str
    name: str
    status: JobStatus
    model: str = Field(description="the name under which the model is served, once the job has succeeded")
    submitted_at: str = Field(description="ISO 8601, UTC")
    started_at: str | None
    finished_at: str | None
    accuracy: float | None = Field(description="on the test rows, once the job has succeeded")

    @classmethod
    def of(cls, record: JobRecord) -> "JobSummary":
        """The summary of a record."""
        return cls(**_summary(record))


class JobResource(JobSummary):
    """A job in full."""

    activity: Activity | None = Field(description="what it is busy with; null unless it is running")
    progress: JobProgress | None = Field(description="from the moment at which the chain's start is known")
    result: dict[str, Any] | None
    error: dict[str, Any] | None = Field(description="why the job failed: type, message and, where known, the fields")
    spec: dict[str, Any] = Field(description="the job file, every default spelt out")

    @classmethod
    def full(cls, record: JobRecord, progress: JobProgress | None) -> "JobResource":
        """The whole of a record."""
        return cls(
            **_summary(record),
            activity=Activity.model_validate(record.activity) if record.activity else None,
            progress=progress,
            result=record.result,
            error=record.error,
            spec=record.spec,
        )


class JobPage(BaseModel):
    """Some jobs, the newest first."""

    jobs: list[JobSummary]
    next: str | None = Field(description="as `before`, it asks for the page that follows; null on the last")


class EventResource(BaseModel):
    """One thing that happened to a job."""

    seq: int
    kind: str = Field(description="a status of the job, `opening`, `round` or `ending`")
    at: str
    data: dict[str, Any]


class EventPage(BaseModel):
    """Some events, the oldest first."""

    events: list[EventResource]
    last: int = Field(description="as `after`, it asks for what happened since")
    finished: bool = Field(description="whether the job is over and these are its last events")


class ServedModel(BaseModel):
    """A finished stack that answers."""

    name: str
    job: str
    task: ModelTask
    base: str
    classes: list[str] = Field(description="of a classifier; a language model has none")
    accuracy: float = Field(description="on the test rows; a language model's, of their tokens")
    created_at: str

    @classmethod
    def of(cls, record: JobRecord) -> "ServedModel":
        """The model of a job that has succeeded."""
        result, model = record.result or {}, record.spec["model"]
        return cls(
            name=record.model,
            job=record.id,
            task=model["task"],
            base=model["base"],
            classes=result["classes"],
            accuracy=result["accuracy"],
            created_at=record.finished_at or "",
        )


class ModelList(BaseModel):
    """Every model that answers: for each name, that of the newest job that has succeeded."""

    models: list[ServedModel]


class ClassifyRequest(BaseModel):
    """Texts, and the model that is to classify them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(description="a name from `GET /v1/models`, such as `minilm:docstrings`")
    texts: list[Annotated[str, Field(max_length=100_000)]] = Field(min_length=1, max_length=256)


class Label(BaseModel):
    """The answer for one text."""

    label: str
    score: float = Field(description="the probability of `label`")
    scores: dict[str, float] = Field(description="the probability of every class")


class ClassifyResponse(BaseModel):
    """An answer for each text, in their order."""

    model: str
    job: str
    results: list[Label]


class Health(BaseModel):
    """Whether the service works, part by part."""

    status: Literal["ok", "unavailable"]
    checks: dict[str, str]


class FieldProblem(BaseModel):
    """One thing wrong with a request."""

    field: str
    value: str | None = Field(description="in Python's notation; null where it is missing")
    expected: str


class ProblemDetails(BaseModel):
    """Every error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    instance: str = Field(description="the path that was asked for")
    request_id: str = Field(description="also in the header X-Request-ID, and in the service's log")
    errors: list[FieldProblem] = Field(default_factory=list)


def _classes(job_started: JobStarted) -> list[str]:
    return list(dict.fromkeys(client.client_class for client in job_started.admitted))


def _class_memory(name: str, job_started: JobStarted, newest: Round | None) -> ClassMemory:
    """By its turns in the newest round, or where it had none by the plans of its clients."""
    turns = [turn for turn in newest.turns if turn.client_class == name] if newest else []
    if newest and turns:
        peaks = [turn.peak_bytes for turn in turns if turn.peak_bytes is not None]
        return ClassMemory.of(turns, [newest.top - turn.bottom + 1 for turn in turns], peaks)
    clients = [client for client in job_started.admitted if client.client_class == name]
    return ClassMemory.of(clients, [client.window for client in clients], [])


def _summary(record: JobRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "status": record.status,
        "model": record.model,
        "submitted_at": record.submitted_at,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "accuracy": (record.result or {}).get("accuracy"),
    }
