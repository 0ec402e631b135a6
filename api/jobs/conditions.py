"""The conditions of a job: what is true of it, why, and since when. They follow from the events of its states."""

from collections.abc import Sequence
from typing import get_args

from chainfed_ray.api.schemas.jobs import Condition, ConditionType, Truth
from chainfed_ray.cluster.tables import Event
from chainfed_ray.records.states import FINISHED, Status

WAITING = "waiting"  # of a job in the queue: it may not begin yet
CHANGES: tuple[str, ...] = (*get_args(Status), WAITING)
"""The kinds of events from which conditions follow."""
_REASONS = {
    "queued": "InQueue",
    WAITING: "MemoryLimit",
    "validating": "Validating",
    "running": "Training",
    "pausing": "PauseRequested",
    "paused": "PauseRequested",
    "cancelling": "CancelRequested",
    "succeeded": "Succeeded",
    "cancelled": "CancelRequested",
}


def conditions(changes: Sequence[Event]) -> list[Condition]:
    """The conditions of a job after these ``changes``: all of its events of the kinds in ``CHANGES``, the oldest first."""
    found: dict[ConditionType, Condition] = {}
    for change in changes:
        reason = _REASONS.get(change.kind) or str(change.data.get("type", "Failed"))
        truths: dict[ConditionType, Truth | None] = {
            "Validated": _validated(change.kind, found.get("Validated")),
            "Running": "True" if change.kind in ("running", "pausing") else "False",
            "Paused": "True" if change.kind == "paused" else "False",
            "Finished": "True" if change.kind in FINISHED else "False",
        }
        for kind, truth in truths.items():
            before = found.get(kind)
            if truth is not None or before is None:
                status = truth or "Unknown"
                since = before.since if before and before.status == status else change.at
                why = "Validated" if (kind, status) == ("Validated", "True") else reason
                found[kind] = Condition(type=kind, status=status, reason=why, since=since)
    return list(found.values())


def _validated(state: str, validated: Condition | None) -> Truth | None:
    """Whether a job in this state is known to be valid. None if the state does not tell, so what was known remains."""
    if state == "running":
        return "True"
    if state == "validating":
        return "Unknown"
    was_validating = validated is not None and validated.reason == "Validating"  # also if it was to pause since
    return "False" if state == "failed" and was_validating else None
