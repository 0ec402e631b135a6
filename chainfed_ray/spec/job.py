"""``JobSpec``: the one definition of a job.

It is the YAML file, the body of ``POST /v1/jobs`` and the object that the coordinator reads. ``parse.py`` makes one of a
document, and names the path of every key that is unknown or wrong; ``rules.py`` says what contradicts what. What depends on
the data or the model is checked in ``prepare.py``.
"""

from typing import Any

from pydantic import Field

from chainfed_ray.record import VERSION, Version
from chainfed_ray.spec.recipes import Recipe
from chainfed_ray.spec.sections import (
    AggregationSpec,
    ChainSpec,
    DataSpec,
    EvaluationSpec,
    FleetSpec,
    ModelSpec,
    PrivacySpec,
    RoundsSpec,
    Section,
    Slug,
)


class JobSpec(Section):
    """A fine-tuning job."""

    name: Slug = Field(description="of the job and, once it is done, of its model: `<base>:<name>`")
    recipe: Recipe = Field(
        "chainfed-ray", description="whose defaults hold for what the job leaves open: ours, or the `paper`'s"
    )
    model: ModelSpec = Field(description="the base model")
    data: DataSpec = Field(description="the examples")
    fleet: FleetSpec = Field(description="the clients")
    chain: ChainSpec = Field(default_factory=lambda: ChainSpec(), description="the method")
    rounds: RoundsSpec = Field(default_factory=lambda: RoundsSpec(), description="the federation")
    aggregation: AggregationSpec = Field(default_factory=lambda: AggregationSpec(), description="of a round's updates")
    privacy: PrivacySpec | None = Field(None, description="differential privacy; by default there is none")
    evaluation: EvaluationSpec = Field(default_factory=lambda: EvaluationSpec(), description="the measurements")
    seed: int = Field(0, ge=0, lt=2**63, description="from which every random choice follows")
    version: Version = Field(VERSION, description="of the form of this document")

    def document(self) -> dict[str, Any]:
        """The job as JSON-ready data, every default spelt out; ``parse_job`` gives the same job back."""
        return self.model_dump(mode="json")

    @property
    def quorum(self) -> int:
        """Updates without which a round does not count: by default half, but no fewer than the rule needs."""
        if self.rounds.quorum is not None:
            return self.rounds.quorum
        return max((self.rounds.clients + 1) // 2, self.aggregation.fewest)

    @property
    def model_name(self) -> str:
        """What the finished model is called: ``<base>:<name>``, with the last part of the base's path."""
        path = self.model.base.partition(":")[2].partition("@")[0]
        return f"{path.rstrip('/').rpartition('/')[2]}:{self.name}"
