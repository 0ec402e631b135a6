"""Who of a fleet takes part, and with which plan: the planner (planner.py) asked for each client and stage."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.planner import (
    ClientResources,
    TurnPlan,
    TurnRequirements,
    cache_bytes,
    fallback_plan,
    plan,
    shortfall,
)
from chainfed_ray.chain import Window
from chainfed_ray.data.tokens import Examples


@dataclass(frozen=True)
class Candidate:
    """A client of the fleet: its examples, and the bytes that it declared; ``disk`` is None for as many as there are.

    ``availability`` is the probability that it answers when it is sampled; at ``speed`` 0.5 its turns take twice as long.
    """

    name: str
    client_class: str
    examples: Examples
    memory: int
    disk: int | None
    availability: float = 1.0
    speed: float = 1.0


class Planner:
    """The plans of one job. Clients that are alike have the same plan, so each is made once."""

    def __init__(self, costs: MemoryProfile, requirements: TurnRequirements) -> None:
        self.costs, self.requirements = costs, requirements
        self._plans: dict[tuple[Window, ClientResources], TurnPlan | None] = {}

    def starting_at(self, start: int) -> "Planner":
        """The planner for a chain whose lowest layer has been found."""
        return Planner(self.costs, replace(self.requirements, start=start))

    def means(self, candidate: Candidate) -> ClientResources:
        """What the planner needs to know of a client."""
        disk, needed = candidate.disk, self._cache_bytes(candidate)
        cached = disk is None or needed <= disk
        few = len(candidate.examples) <= self.requirements.batch_size
        return ClientResources(
            memory=candidate.memory,
            longest=int(candidate.examples.lengths.max()),
            cached=cached,
            offload_disk=None if disk is None else disk - (needed if cached else 0),
            batch=min(len(candidate.examples), self.requirements.batch_size),
            one_step=few and self.requirements.epochs == 1,
        )

    def plan(self, candidate: Candidate, stage: Window) -> TurnPlan | None:
        """The best plan of a client for its turns in ``stage``; None if its memory is too small for any window."""
        means = self.means(candidate)
        if (stage, means) not in self._plans:
            self._plans[stage, means] = plan(self.costs, self.requirements, stage, means)
        return self._plans[stage, means]

    def fallback_plan(self, candidate: Candidate, stage: Window) -> TurnPlan | None:
        """The plan for a client that exceeded its best one; None if there is none."""
        best = self.plan(candidate, stage)
        return best and fallback_plan(self.costs, self.requirements, stage, self.means(candidate), best)

    def shortfall(self, candidate: Candidate, stage: Window) -> int:
        """The bytes of memory that a client lacks for any window."""
        return shortfall(self.costs, self.requirements, stage, self.means(candidate))

    def disk_bytes(self, candidate: Candidate, plan: TurnPlan) -> int:
        """The disk that a client's turns use."""
        return (self._cache_bytes(candidate) if plan.prefix.cached else 0) + plan.offload_bytes

    def _cache_bytes(self, candidate: Candidate) -> int:
        return cache_bytes(self.costs, self.requirements, len(candidate.examples), len(candidate.examples.ids))


@dataclass(frozen=True)
class Admission:
    """Who takes part, with the plan of the first stage; who does not, with the bytes that it lacks; and Q, the width."""

    admitted: tuple[tuple[Candidate, TurnPlan], ...]
    excluded: tuple[tuple[Candidate, int], ...]
    width: int


def admit(planner: Planner, candidates: Iterable[Candidate], width: int, listen: Listener = no_listener) -> Admission:
    """Plan for the chain's lowest window, which has the most adapters above it and so needs the most memory of all.

    Q is ``width``, or as many adapters as the client with the most memory can train together.
    """
    candidates = tuple(candidates)
    for narrower in range(width, 0, -1):
        stage = Window(planner.requirements.start, planner.requirements.start + narrower - 1)
        reporter = Reporter(f"planning the clients with windows of {narrower}", listen)
        each = reporter.each(candidates, len(candidates), "clients")
        plans = [(candidate, planner.plan(candidate, stage)) for candidate in each]
        admitted = tuple((candidate, plan) for candidate, plan in plans if plan)
        if narrower == 1 or any(len(plan.window) == narrower for _, plan in admitted):
            excluded = tuple((candidate, planner.shortfall(candidate, stage)) for candidate, plan in plans if not plan)
            return Admission(admitted, excluded, narrower)
    raise ValueError(f"a window of {width} adapters")
