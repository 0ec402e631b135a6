"""The JSON of the REST API, version 1: what requests send, and what answers contain."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from chainfed_ray.cluster.jobs.versions import Trained, name_of_exit
from chainfed_ray.cluster.tables import JobRecord
from chainfed_ray.records.result import ExitScore

_MOST_KEYS = 100
_SUM_TOLERANCE = 1e-6
MOST_TEXTS = 256  # of a request
LONGEST_NAME = (
    1000  # characters of a model's name; a base model's may be a folder's, and a folder's has 255 bytes at most
)
MOST_CHARACTERS = 500_000  # of all texts of a request to a model
LONGEST_TEXT = 100_000  # characters of one of them
PromptText = Annotated[str, Field(max_length=LONGEST_TEXT)]


def example(body: JsonDict) -> ConfigDict:
    """The configuration of a model with an example of it, which the OpenAPI document shows."""
    return ConfigDict(json_schema_extra={"examples": [body]})


def bounded(texts: Sequence[str]) -> Sequence[str]:
    """Check that texts have no more than ``MOST_CHARACTERS`` together: the time and memory for them grow with that."""
    if sum(map(len, texts)) > MOST_CHARACTERS:
        raise ValueError(f"at most {MOST_CHARACTERS:,} characters in all")
    return texts


def one_or_more(most: int, longest: int = LONGEST_TEXT, shortest: int = 0, *others: dict[str, Any]) -> BeforeValidator:
    """Lets one text be given for a list with that text.

    The JSON schema then has both: a text or up to ``most`` texts, each of up to ``longest`` characters; or one of ``others``.
    """
    text = {"type": "string", "maxLength": longest} | ({"minLength": shortest} if shortest else {})
    texts = {"type": "array", "items": text, "minItems": 0 if others else 1, "maxItems": most}
    given = Annotated[Any, WithJsonSchema({"anyOf": [text, texts, *others]})]
    return BeforeValidator(_listed, json_schema_input_type=given)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class RequestBody(BaseModel):
    """A body in JSON, or an object in it. Its errors are few, however much is wrong with it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > _MOST_KEYS:
            raise ValueError(f"an object of at most {_MOST_KEYS} fields")
        return value


ModelTask = Literal["sequence-classification", "causal-lm"]


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


class ModelEntry(BaseModel):
    """A served model in the form of OpenAI's API."""

    id: str = Field(description="the model's name")
    object: Literal["model"] = "model"
    created: int = Field(description="seconds since 1970, UTC")
    owned_by: Literal["chainfed"] = "chainfed"


class ServedModel(ModelEntry):
    """A model that the service answers with."""

    name: str = Field(description="the same as `id`")
    kind: Literal["stack", "base"] = Field(description="a `stack` of adapters on a base model, or a `base` model alone")
    job: str | None = Field(description="the id of the job that trained it; null for a base model")
    round: int | None = Field(
        None, description="the round after which it was committed, if that is in the name; of an early exit always"
    )
    layers: int | None = Field(
        None, description="of an early exit: how many of the base model's layers run, the lowest; null: all of them"
    )
    task: ModelTask
    base: str = Field(description="the base model, as in the job file")
    classes: list[str] = Field(description="the classes of a classifier; empty for a language model and a base model")
    accuracy: float | None = Field(
        description="accuracy on the test rows; of a round and of an early exit, on the validation rows; of a language model, "
        "on their tokens; null for a base model"
    )
    created_at: str = Field(description="ISO 8601, UTC")

    @classmethod
    def of_round(cls, trained: Trained) -> "ServedModel":
        """The stack of a job after one of its rounds. The job may still train."""
        record, index, model = trained.record, trained.stack.index, trained.record.spec["model"]
        name, at = f"{record.model}@{index}", record.started_at or record.submitted_at
        evaluation = trained.stack.evaluation or {}
        return cls(
            id=name,
            created=int(datetime.fromisoformat(at).timestamp()),
            name=name,
            kind="stack",
            job=record.id,
            round=index,
            task=model["task"],
            base=model["base"],
            classes=list(trained.classes),
            accuracy=evaluation.get("accuracy"),
            created_at=at,
        )

    def exit(self, score: ExitScore) -> "ServedModel":
        """The early exit of this model with the measured ``score``."""
        name = name_of_exit(self.name, score.layers)
        own = {"id": name, "name": name, "round": score.round, "layers": score.layers, "accuracy": score.accuracy}
        return self.model_copy(update=own)

    @classmethod
    def of_base(cls, record: JobRecord) -> "ServedModel":
        """The base model of the job in ``record``, alone."""
        name, model = record.model.partition(":")[0], record.spec["model"]
        return cls(
            id=name,
            created=int(datetime.fromisoformat(record.submitted_at).timestamp()),
            name=name,
            kind="base",
            job=None,
            task=model["task"],
            base=model["base"],
            classes=[],
            accuracy=None,
            created_at=record.submitted_at,
        )

    @classmethod
    def of(cls, record: JobRecord) -> "ServedModel":
        """The model of the job in ``record``, which must have succeeded."""
        result, model = record.result or {}, record.spec["model"]
        finished_at = record.finished_at or ""
        return cls(
            id=record.model,
            created=int(datetime.fromisoformat(finished_at).timestamp()),
            name=record.model,
            kind="stack",
            job=record.id,
            task=model["task"],
            base=model["base"],
            classes=result["classes"],
            accuracy=result["accuracy"],
            created_at=finished_at,
        )


class ModelList(BaseModel):
    """Every served model: in ``models``, and in the form of OpenAI's API in ``data``. Base models come first.

    A base model is served as soon as a job on it runs.
    If several jobs have the same model name, the newest one that succeeded is served.
    """

    models: list[ServedModel]
    object: Literal["list"] = "list"
    data: list[ModelEntry]
    has_more: bool = Field(False, description="true if there are more: give the last `id` as `after` for the next page")


class AliasTargets(RequestBody):
    """What an alias stands for. A new model may be tried with a small share of the requests first."""

    model_config = example({"targets": {"minilm:docstrings@9": 0.9, "minilm:docstrings@12": 0.1}})

    targets: dict[Annotated[str, Field(max_length=LONGEST_NAME)], Annotated[float, Field(gt=0, le=1)]] = Field(
        min_length=1,
        max_length=8,
        description="names of models, and the share of the requests that each has; together 1",
    )

    @field_validator("targets")
    @classmethod
    def _whole(cls, targets: dict[str, float]) -> dict[str, float]:
        if abs(sum(targets.values()) - 1) > _SUM_TOLERANCE:
            raise ValueError(f"shares that are 1 together; these are {sum(targets.values()):g}")
        return targets


class AliasResource(BaseModel):
    """A name that stands for one model, or for several."""

    model_config = example({"name": "search", "targets": {"minilm:docstrings@9": 0.9, "minilm:docstrings@12": 0.1}})

    name: str
    targets: dict[str, float] = Field(description="names of models, and the share of the requests that each has")


class AliasList(BaseModel):
    """Every alias."""

    aliases: list[AliasResource]


class ClassifyRequest(RequestBody):
    """Texts to classify, and the model to use."""

    model_config = example({"model": "minilm:docstrings", "texts": ["Return the mean of the values."], "top_k": 1})

    model: str = Field(max_length=LONGEST_NAME, description="a name from `GET /v1/models`, such as `minilm:docstrings`")
    texts: Annotated[list[PromptText], FailFast(), AfterValidator(bounded)] = Field(
        min_length=1, max_length=MOST_TEXTS, description=f"{MOST_CHARACTERS:,} characters in all, at most"
    )
    top_k: int | None = Field(None, ge=1, description="give the scores of so many of the likeliest classes, not of all")


class Label(BaseModel):
    """The class of one text."""

    label: str
    score: float = Field(description="the probability of `label`")
    scores: dict[str, float] = Field(
        description="the probability of every class, or of the `top_k`; the likeliest first"
    )


class ClassifyResponse(BaseModel):
    """A label for each text, in the order of the request."""

    model_config = example(
        {
            "model": "minilm:docstrings",
            "job": "docstrings-1f2e3d4c",
            "results": [{"label": "statistics", "score": 0.97, "scores": {"statistics": 0.97}}],
        }
    )

    model: str
    job: str
    results: list[Label]


class Health(BaseModel):
    """The health of the service and of each of its parts."""

    model_config = example({"status": "ok", "checks": {"database": "ok", "storage": "ok"}})

    status: Literal["ok", "unavailable"]
    checks: dict[str, str] = Field(description="for each part `ok`, or why it does not work")


class FieldProblem(BaseModel):
    """A field of a request that is wrong."""

    field: str = Field(description="the field's path, such as `rounds.clients`")
    value: str | None = Field(description="the value in Python's notation; null if the field is missing")
    expected: str = Field(description="what the field must be")


class OpenAIError(BaseModel):
    """An error in the form of OpenAI's API, whose clients look for it."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="the first field that is wrong")
    code: str = Field(description="the kind of problem, such as `model_not_found`")


class ProblemDetails(BaseModel):
    """The format of every error: problem details (RFC 9457), with the same in the form of OpenAI's API as `error`."""

    model_config = example(
        {
            "type": "urn:chainfed:problem:invalid-request",
            "title": "Invalid request",
            "status": 422,
            "detail": "top_k is 0; expected greater than or equal to 1",
            "instance": "/v1/classify",
            "request_id": "5f2c9a1e7b3d4c6f8a0b1c2d3e4f5a6b",
            "errors": [{"field": "top_k", "value": "0", "expected": "greater than or equal to 1"}],
            "error": {
                "message": "top_k is 0; expected greater than or equal to 1",
                "type": "invalid_request_error",
                "param": "top_k",
                "code": "invalid_request",
            },
        }
    )

    type: str = Field(description="the kind of problem, for programs: `urn:chainfed:problem:…`")
    title: str
    status: int
    detail: str = Field(description="what is wrong, for people")
    instance: str = Field(description="the path of the request")
    request_id: str = Field(description="the request's id, also in the header X-Request-ID and in the service's log")
    errors: list[FieldProblem]
    error: OpenAIError
