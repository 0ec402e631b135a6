"""``JobSpec``: the one definition of a job.

It is the YAML file, the body of ``POST /v1/jobs`` and the object that the coordinator reads. ``parse.py`` makes one from a
document, and names the path of every key that is unknown or wrong. ``rules.py`` checks keys against each other. ``prepare.py``
checks what depends on the data or the model.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from chainfed_ray.record import VERSION, Version
from chainfed_ray.spec.fleet import FleetSpec
from chainfed_ray.spec.recipes import Recipe
from chainfed_ray.spec.sections import (
    AggregationSpec,
    ChainSpec,
    DataSpec,
    EvaluationSpec,
    LabelValue,
    ModelSpec,
    PrivacySpec,
    RoundsSpec,
    Section,
    Slug,
)

_BEFORE = 1  # the version of records changed then, and of jobs it changed nothing


def _brought_forward(version: Any) -> Any:
    return VERSION if type(version) is int and version == _BEFORE else version


class JobSpec(Section):
    """A fine-tuning job."""

    name: Slug = Field(description="a name for the job; its finished model is called `<base>:<name>`")
    recipe: Recipe = Field(
        "chainfed-ray", description="which defaults apply to keys that are not given: ours, or the `paper`'s"
    )
    model: ModelSpec = Field(description="a section for the base model, with `base`")
    data: DataSpec = Field(description="a section for the examples, with `train`")
    fleet: FleetSpec = Field(description="a section for the clients, with `clients`")
    chain: ChainSpec = Field(default_factory=lambda: ChainSpec(), description="a section for the method")
    rounds: RoundsSpec = Field(default_factory=lambda: RoundsSpec(), description="a section for the federated rounds")
    aggregation: AggregationSpec = Field(
        default_factory=lambda: AggregationSpec(), description="a section for how a round's updates are combined"
    )
    privacy: PrivacySpec | None = Field(
        None, description="a section for differential privacy; by default there is none"
    )
    evaluation: EvaluationSpec = Field(default_factory=lambda: EvaluationSpec(), description="a section for evaluation")
    labels: dict[Slug, LabelValue] = Field(
        default_factory=dict, max_length=32, description="names with values, by which a service lists jobs"
    )
    priority: int = Field(
        0,
        ge=-100,
        le=100,
        description="in a service: of a tenant's jobs that wait, those with a greater one begin first",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="the seed of every random choice")
    version: Annotated[Version, BeforeValidator(_brought_forward)] = Field(
        VERSION, description="the version of this document's format; one of version 1 is read as well"
    )

    def document(self) -> dict[str, Any]:
        """The job as JSON-ready data with every default spelled out. ``parse_job`` makes the same job from it."""
        return self.model_dump(mode="json")

    @property
    def quorum(self) -> int:
        """The fewest updates with which a round counts: by default half of those sampled, but no fewer than the rule needs."""
        if self.rounds.quorum is not None:
            return self.rounds.quorum
        return max((self.rounds.clients + 1) // 2, self.aggregation.fewest)

    def window(self, layers: int) -> int:
        """Q on a base model of L = ``layers``: the job's own or, by default, as many of 2, or 8 of a language model, as fit."""
        if self.chain.window is not None:
            return self.chain.window
        start = self.chain.start if isinstance(self.chain.start, int) else 0
        return max(1, min(8 if self.model.task == "causal-lm" else 2, layers - start))

    def lowest_start(self, layers: int) -> int:
        """The lowest layer where the chain may start, on a base model of L = ``layers``: 0 if it is not known yet."""
        match self.chain.start:
            case "last":
                return layers - self.window(layers)
            case int() as layer:
                return layer
            case _:
                return 0

    @property
    def model_name(self) -> str:
        """The finished model's name, ``<base>:<name>``: ``<base>`` is the last part of the base model's path.

        A base model with quantized matrices is another base: ``<base>-nf4``.
        """
        scheme, _, path = self.model.base.partition(":")
        path = path.partition("@")[0] if scheme == "hf" else path  # a folder may have an @ in its name
        form = "" if self.model.quantization == "none" else f"-{self.model.quantization}"
        return f"{path.rstrip('/').rpartition('/')[2]}{form}:{self.name}"
