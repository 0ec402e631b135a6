"""The names of models, and the stacks that a job has while it trains: its newest one, its best one and its early exits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.rounds import Stack
from chainfed_ray.cluster.tables import JobRecord
from chainfed_ray.records.result import ExitScore

Version = Literal["latest", "best"] | int
_LAYERS = "#layers="
_MOST_JOBS = 100  # of one model, among which one with a round is looked for
_MOST_DIGITS = 10  # of a round, or of a number of layers


class ModelName(NamedTuple):
    """The parts of a name such as ``minilm:support@latest#layers=4``; the last two may be missing."""

    stem: str
    version: Version | None = None
    layers: int | None = None

    @classmethod
    def of(cls, name: str) -> "ModelName":
        """The parts of ``name``. What looks like a part and is none belongs to the stem."""
        whole, _, count = name.rpartition(_LAYERS)
        layers = _number(count) if whole else None
        whole = name if layers is None else whole
        stem, _, version = whole.rpartition("@")
        wanted: Version | None = version if version in ("latest", "best") else _number(version)  # type: ignore[assignment]
        return cls(whole, None, layers) if wanted is None or ":" not in stem else cls(stem, wanted, layers)


def name_of_exit(model: str, layers: int) -> str:
    """The name of the early exit of ``model`` after so many layers."""
    return f"{model}{_LAYERS}{layers}"


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < _MOST_DIGITS else None


@dataclass(frozen=True)
class Trained:
    """A ``stack`` of the job in ``record``, and the ``exits`` that the job has kept up to now, the lowest first."""

    record: JobRecord
    stack: Stack
    classes: tuple[str, ...]
    exits: Sequence[ExitScore] = ()


def trained(store: JobStore, model: str, version: Version) -> Trained | None:
    """The stack of the newest job of ``model`` that has finished a round. None if there is no such job, or no such stack.

    Of a job's stacks the newest one is kept, and the one after whose round the whole model had the least held-out loss.
    """
    for limit in (1, _MOST_JOBS):  # nearly always it is the newest job, and the documents of others need not be read
        for record in store.of_model(model, limit):
            if found := store.rounds.of(record.id):
                kept: dict[Version, Stack] = {"latest": found.newest, "best": found.best}
                kept |= {stack.index: stack for stack in (found.best, found.newest)}
                return Trained(record, kept[version], found.classes, found.exits) if version in kept else None
    return None


def exits_of(record: JobRecord) -> list[ExitScore]:
    """The early exits of a job that has succeeded. One that ended before there were such names has none."""
    return [ExitScore.model_validate(found) for found in (record.result or {}).get("exits", ())]
