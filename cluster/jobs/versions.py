"""The stacks that a job has while it trains, by their rounds: its newest one and its best."""

from dataclasses import dataclass
from typing import Any, Literal

from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.tables import JobRecord

Version = Literal["latest", "best"] | int


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


def _best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The round with the least held-out loss, of equals the newest; the newest round, if none was evaluated."""
    judged = [found for found in rounds if found.get("evaluation") and found["evaluation"].get("loss") is not None]
    return min(reversed(judged), key=lambda found: float(found["evaluation"]["loss"]), default=rounds[-1])
