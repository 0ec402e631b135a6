"""Served models, their other names, and the classes of texts."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, FailFast, Field, field_validator

from chainfed_ray.api.schemas.bodies import (
    LONGEST_NAME,
    MOST_CHARACTERS,
    MOST_TEXTS,
    PromptText,
    RequestBody,
    bounded,
    example,
)

_SUM_TOLERANCE = 1e-6

ModelTask = Literal["sequence-classification", "causal-lm"]


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
