"""The names of models, and the stacks that a job has while it trains: its newest one, its best one and its early exits."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.tables import JobRecord
from chainfed_ray.records.result import ExitScore
from chainfed_ray.records.rounds import Round

Version = Literal["latest", "best"] | int
_LAYERS = "#layers="
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
    """A stack of the job in ``record``, after the round whose record is ``round``."""

    record: JobRecord
    round: dict[str, Any]
    classes: tuple[str, ...]


def trained(store: JobStore, model: str, version: Version) -> Trained | None:
    """The stack of the newest job of ``model`` that has finished a round. None if there is no such job, or no such stack.

    Of a job's stacks the newest one is kept, and the one after whose round the whole model had the least held-out loss.
    """
    for record in store.of_model(model):
        if (newest := store.newest(record.id, "round")) is None:
            continue
        last = newest.data
        kept: dict[Version, dict[str, Any]] = {"latest": last, last["index"]: last}
        if version not in kept:  # all rounds are read only where the best one may be meant
            best = _best([event.data for event in store.of_kind(record.id, "round")])
            kept |= {"best": best, best["index"]: best}
        started = store.newest(record.id, "started")
        classes = tuple(started.data["classes"]) if started else ()
        return Trained(record, kept[version], classes) if version in kept else None
    return None


def exits_of(record: JobRecord) -> list[ExitScore]:
    """The early exits of a job that has succeeded. One that ended before there were such names has none."""
    return [ExitScore.model_validate(found) for found in (record.result or {}).get("exits", ())]


def exits_so_far(store: JobStore, found: Trained) -> list[ExitScore]:
    """The early exits that a job has kept up to now."""
    job = found.record.id
    rounds = (event.data for event in store.of_kind(job, "round"))
    started = store.newest(job, "started")
    # Rounds without an exit are of a version that had no such names.
    records = [Round.model_validate(data) for data in rounds if data.get("exit") is not None]
    return [*ExitScore.of(records, started.data["layers"])] if started and records else []


def _best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The round with the least held-out loss, of equals the newest; the newest round, if none was evaluated."""
    judged = [found for found in rounds if found.get("evaluation") and found["evaluation"].get("loss") is not None]
    return min(reversed(judged), key=lambda found: float(found["evaluation"]["loss"]), default=rounds[-1])
