"""Sums a job's records up by class of clients, for displays, tables and plots."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from chainfed_ray.records.fleet import AdmittedClients, Weights
from chainfed_ray.records.rounds import JobStarted, Round, Turn

_NAME_LENGTH = 14


class TurnSettings(NamedTuple):
    """How a client runs a turn within its memory.

    ``window`` counts the adapters trained together, ``micro_batch`` the examples held at a time. ``weights`` says whether
    layers are resident or streamed; ``activations_offloaded`` whether saved activations go to disk, ``activations_recomputed``
    whether they are computed again in the backward pass. ``rank`` counts the ranks of each LoRA that are trained; None: all.
    """

    window: int
    micro_batch: int
    weights: Weights
    activations_offloaded: bool
    activations_recomputed: bool
    rank: int | None

    @classmethod
    def planned(cls, client: AdmittedClients) -> "TurnSettings":
        """The plan of some clients for the first stage."""
        return cls(
            client.window,
            client.micro_batch,
            client.weights,
            client.activations_offloaded,
            client.activations_recomputed,
            client.rank,
        )

    @classmethod
    def used(cls, record: Round, turn: Turn) -> "TurnSettings":
        """The settings that ``turn`` had in its round ``record``."""
        return cls(
            record.top - turn.bottom + 1,
            turn.micro_batch,
            turn.weights,
            turn.activations_offloaded,
            turn.activations_recomputed,
            turn.rank,
        )


@dataclass
class FleetClass:
    """The sums of one class of clients.

    Bytes are those of one client: ``planned``, ``peak`` (measured) and ``shortfall`` are the largest of any client of the
    class. ``sent`` is the sum over all turns. ``retried`` counts turns that exceeded their plan and ran a second time.
    ``settings`` are those of the turns so far; before the first round, the planned ones.
    """

    name: str
    budget: int
    clients: int = 0
    excluded: int = 0
    shortfall: int = 0
    planned: int = 0
    peak: int | None = None
    turns: int = 0
    retried: int = 0
    failed_turns: int = 0
    sent: int = 0
    settings: set[TurnSettings] = field(default_factory=set)


def by_class(job_started: JobStarted, rounds: Sequence[Round]) -> list[FleetClass]:
    """Every class of the fleet, the smallest budget first."""
    classes: dict[str, FleetClass] = {}
    job_started = job_started.with_late(site for record in rounds for site in record.late)
    for admitted in job_started.admitted:
        fleet = classes.setdefault(admitted.client_class, FleetClass(admitted.client_class, admitted.budget_bytes))
        fleet.clients += admitted.clients
        fleet.planned = max(fleet.planned, admitted.planned_bytes)
    for client in job_started.excluded:
        fleet = classes.setdefault(client.client_class, FleetClass(client.client_class, client.budget_bytes))
        fleet.excluded += client.clients
        fleet.shortfall = max(fleet.shortfall, client.shortfall_bytes)
    for record in rounds:
        for turn in record.turns:
            fleet = classes[turn.client_class]
            fleet.turns += 1
            fleet.retried += turn.exceeded is not None
            fleet.sent += turn.sent_bytes
            fleet.planned = max(fleet.planned, turn.planned_bytes)
            fleet.settings.add(TurnSettings.used(record, turn))
            if turn.peak_bytes is not None:
                fleet.peak = max(turn.peak_bytes, fleet.peak or 0)
        for failed in record.failed_turns:
            classes[failed.client_class].failed_turns += 1
    for admitted in job_started.admitted:
        fleet = classes[admitted.client_class]
        if not fleet.turns:
            fleet.settings.add(TurnSettings.planned(admitted))
    return sorted(classes.values(), key=lambda fleet: (fleet.budget, fleet.name))


def in_words(settings: Collection[TurnSettings]) -> str:
    """Describe the settings of some turns, such as ``windows of 1–2, 4 examples at a time, weights streamed in some``."""
    examples = span(one.micro_batch for one in settings)
    words = [
        f"windows of {span(one.window for one in settings)}",
        f"{examples} example{'' if examples == '1' else 's'} at a time",
    ]
    for option, chosen in (
        ("weights streamed", [one.weights == "streamed" for one in settings]),
        ("activations on disk", [one.activations_offloaded for one in settings]),
        ("activations computed again", [one.activations_recomputed for one in settings]),
    ):
        if any(chosen):
            words.append(option if all(chosen) else f"{option} in some")
    if ranks := [one.rank for one in settings if one.rank is not None]:
        words.append(f"the first {span(ranks)} of each LoRA's ranks")
    return ", ".join(words)


def span(numbers: Iterable[int]) -> str:
    """The range of some numbers: ``4–16``, or ``4`` if all are equal."""
    present = sorted(set(numbers))
    return str(present[0]) if len(present) == 1 else f"{present[0]}–{present[-1]}"


def short(name: str) -> str:
    """A name, cut to what fits into a column or below an axis."""
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
