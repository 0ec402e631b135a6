"""A job's records, added up by class of clients: what displays, tables and plots have in common."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from chainfed_ray.budget.planner import WeightPlacement
from chainfed_ray.records.rounds import AdmittedClient, JobStarted, Round, Turn

_NAME_LENGTH = 14


class Way(NamedTuple):
    """How a turn is taken: the adapters trained together, the examples at a time, what is loaded at once, and the spill."""

    window: int
    micro_batch: int
    weights: WeightPlacement
    activations_offloaded: bool

    @classmethod
    def planned(cls, client: AdmittedClient) -> "Way":
        """As it is planned for the first stage."""
        return cls(client.window, client.micro_batch, client.weights, client.activations_offloaded)

    @classmethod
    def taken(cls, record: Round, turn: Turn) -> "Way":
        """As it was, in a round."""
        return cls(record.top - turn.bottom + 1, turn.micro_batch, turn.weights, turn.activations_offloaded)


@dataclass
class FleetClass:
    """One class; bytes are a client's, the planned and measured ones the most of any client's.

    ``again`` are turns that exceeded their plan and were taken again. ``ways`` are those of the turns, before the first
    round those that are planned.
    """

    name: str
    budget: int
    clients: int = 0
    excluded: int = 0
    shortfall: int = 0
    planned: int = 0
    peak: int | None = None
    turns: int = 0
    again: int = 0
    failed_turns: int = 0
    sent: int = 0
    ways: set[Way] = field(default_factory=set)


def by_class(job_started: JobStarted, rounds: Sequence[Round]) -> list[FleetClass]:
    """Every class of the fleet, the smallest budget first."""
    classes: dict[str, FleetClass] = {}
    for admitted in job_started.admitted:
        fleet = classes.setdefault(admitted.client_class, FleetClass(admitted.client_class, admitted.budget_bytes))
        fleet.clients += 1
        fleet.planned = max(fleet.planned, admitted.planned_bytes)
    for client in job_started.excluded:
        fleet = classes.setdefault(client.client_class, FleetClass(client.client_class, client.budget_bytes))
        fleet.excluded += 1
        fleet.shortfall = max(fleet.shortfall, client.shortfall_bytes)
    for record in rounds:
        for turn in record.turns:
            fleet = classes[turn.client_class]
            fleet.turns += 1
            fleet.again += turn.exceeded is not None
            fleet.sent += turn.sent_bytes
            fleet.planned = max(fleet.planned, turn.planned_bytes)
            fleet.ways.add(Way.taken(record, turn))
            if turn.peak_bytes is not None:
                fleet.peak = max(turn.peak_bytes, fleet.peak or 0)
        for lost in record.failed_turns:
            classes[lost.client_class].failed_turns += 1
    for admitted in job_started.admitted:
        fleet = classes[admitted.client_class]
        if not fleet.turns:
            fleet.ways.add(Way.planned(admitted))
    return sorted(classes.values(), key=lambda fleet: (fleet.budget, fleet.name))


def in_words(ways: Collection[Way]) -> str:
    """``windows of 1–2, 4 examples at a time, matrices streamed``: what turns have in common, and what some of them do."""
    examples = span(way.micro_batch for way in ways)
    words = [
        f"windows of {span(way.window for way in ways)}",
        f"{examples} example{'' if examples == '1' else 's'} at a time",
    ]
    for said, those in (
        ("matrices streamed", [way.weights == "streamed" for way in ways]),
        ("activations on disk", [way.activations_offloaded for way in ways]),
    ):
        if any(those):
            words.append(said if all(those) else f"{said} in some")
    return ", ".join(words)


def span(numbers: Iterable[int]) -> str:
    """``4``, or ``4–16``: from the least to the most."""
    present = sorted(set(numbers))
    return str(present[0]) if len(present) == 1 else f"{present[0]}–{present[-1]}"


def short(name: str) -> str:
    """A name as far as a column or an axis has room for it."""
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
