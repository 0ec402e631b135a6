"""The resources of the REST API, version 1: what goes over the wire, and nothing else."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from chainfed_ray.records import Opening, Round
from cluster.job_store import JobRecord

JobStatus = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


class ClassMemory(BaseModel):
    """Bytes of a client class: declared, planned, and the most that was measured in the newest round."""

    budget: int
    planned: int
    peak: int | None


class Progress(BaseModel):
    """How far a job is, after its newest round."""

    round: int = Field(description="rounds done")
    total_rounds: int
    stage: int = Field(description="counted from 1")
    stages: int
    bottom: int = Field(description="the window's lowest layer, counted from 0")
    top: int
    layers: int
    clients: int = Field(description="clients that take part in the job")
    left_out: int = Field(description="clients whose budget is too small for any window")
    done: int = Field(description="clients whose update counted in the newest round")
    lost: int
    accuracy: float | None = Field(description="on the validation rows")
    memory: dict[str, ClassMemory]

    @classmethod
    def of(cls, opening: Opening, newest: Round | None) -> "Progress":
        """The progress that the newest round, if there is any, has made."""
        peaks: dict[str, int] = {}
        for turn in newest.turns if newest else ():
            if turn.peak_bytes is not None:
                peaks[turn.client_class] = max(turn.peak_bytes, peaks.get(turn.client_class, 0))
        classes: dict[str, ClassMemory] = {}
        for client in opening.admitted:
            before = classes.get(client.client_class)
            planned = max(client.planned_bytes, before.planned if before else 0)
            classes[client.client_class] = ClassMemory(
                budget=client.budget_bytes, planned=planned, peak=peaks.get(client.client_class)
            )
        return cls(
            round=newest.index + 1 if newest else 0,
            total_rounds=opening.total_rounds,
            stage=newest.stage + 1 if newest else 1,
            stages=opening.stages,
            bottom=newest.bottom if newest else opening.start_layer,
            top=newest.top if newest else opening.layers - opening.stages,
            layers=opening.layers,
            clients=len(opening.admitted),
            left_out=len(opening.left_out),
            done=len(newest.turns) if newest else 0,
            lost=len(newest.lost) if newest else 0,
            accuracy=newest.accuracy if newest else None,
            memory=classes,
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


class Job(JobSummary):
    """A job in full."""

    progress: Progress | None = Field(description="from the moment at which the chain's start is known")
    result: dict[str, Any] | None
    error: dict[str, Any] | None = Field(description="why the job failed: type, message and, where known, the fields")
    spec: dict[str, Any] = Field(description="the job file, every default spelt out")

    @classmethod
    def full(cls, record: JobRecord, progress: Progress | None) -> "Job":
        """The whole of a record."""
        return cls(**_summary(record), progress=progress, result=record.result, error=record.error, spec=record.spec)


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
    base: str
    classes: list[str]
    accuracy: float = Field(description="on the test rows")
    created_at: str

    @classmethod
    def of(cls, record: JobRecord) -> "ServedModel":
        """The model of a job that has succeeded."""
        result = record.result or {}
        return cls(
            name=record.model,
            job=record.id,
            base=record.spec["model"]["base"],
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
