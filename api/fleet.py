"""A job's records, added up by class of clients: what displays, tables and plots have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

from chainfed_ray.records import Opening, Round


@dataclass
class FleetClass:
    """One class; bytes are a client's, the planned and measured ones the most of any client's."""

    name: str
    budget: int
    clients: int = 0
    left_out: int = 0
    lacking: int = 0
    planned: int = 0
    peak: int | None = None
    turns: int = 0
    lost: int = 0
    sent: int = 0


def by_class(opening: Opening, rounds: Sequence[Round]) -> list[FleetClass]:
    """Every class of the fleet, the smallest budget first."""
    classes: dict[str, FleetClass] = {}
    for admitted in opening.admitted:
        fleet = classes.setdefault(admitted.client_class, FleetClass(admitted.client_class, admitted.budget_bytes))
        fleet.clients += 1
        fleet.planned = max(fleet.planned, admitted.planned_bytes)
    for client in opening.left_out:
        fleet = classes.setdefault(client.client_class, FleetClass(client.client_class, client.budget_bytes))
        fleet.left_out += 1
        fleet.lacking = max(fleet.lacking, client.lacking_bytes)
    for record in rounds:
        for turn in record.turns:
            fleet = classes[turn.client_class]
            fleet.turns += 1
            fleet.sent += turn.sent_bytes
            if turn.peak_bytes is not None:
                fleet.peak = max(turn.peak_bytes, fleet.peak or 0)
        for lost in record.lost:
            classes[lost.client_class].lost += 1
    return sorted(classes.values(), key=lambda fleet: (fleet.budget, fleet.name))
