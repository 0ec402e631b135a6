"""Which clients of a fleet can take part in a job, and with which plan.

``Planner`` asks the arithmetic of ``budget/planner.py`` for each client and stage. ``admit`` uses it to choose the width of the
window, and to separate the clients that have a plan from those that have none.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.footprint import TurnRequirements, saved_bytes
from chainfed_ray.budget.planner import ClientResources, TurnPlan, cache_bytes, fallback_plan, plan, shortfall
from chainfed_ray.chain import Window
from chainfed_ray.client.survey import Absence, ClientSurvey, Survey
from chainfed_ray.data.tokens import ExampleCounts
from chainfed_ray.errors import InvalidJob
from chainfed_ray.planning.candidates import Candidate, absent_clients, at_site
from chainfed_ray.problem import some_of
from chainfed_ray.records.fleet import (
    AdmittedClients,
    FleetClient,
    FleetTotals,
    LateClient,
    LateSite,
)
from chainfed_ray.spec.fleet import ClientClass, FleetSpec
from chainfed_ray.spec.sections import ChainSpec, RoundsSpec


class Planner:
    """Plans the turns of one job's clients: ``costs`` is what a turn holds, ``requirements`` what the job asks for.

    Clients with equal resources have the same plan, fallback plan and shortfall. Each is computed once and kept.
    """

    def __init__(self, costs: MemoryProfile, requirements: TurnRequirements) -> None:
        self.costs, self.requirements = costs, requirements
        self._plans: dict[tuple[Window, ClientResources], TurnPlan | None] = {}
        self._fallback_plans: dict[tuple[Window, ClientResources], TurnPlan | None] = {}
        self._shortfalls: dict[tuple[Window, ClientResources], int] = {}
        self._most_offloaded: dict[tuple[Window, int, int], int] = {}

    def starting_at(self, start: int) -> "Planner":
        """The same planner for a chain whose lowest layer is ``start``."""
        return Planner(self.costs, replace(self.requirements, start=start))

    def resources(self, candidate: Candidate) -> ClientResources:
        """The memory and disk of a client, and the sizes of its data, as the plan's arithmetic needs them.

        A client without enough disk for the prefix cache runs the prefix anew in each step. The disk that the cache leaves
        may hold offloaded activations.
        """
        disk, needed = candidate.disk, self._cache_bytes(candidate)
        cached = disk is None or needed <= disk
        counts = candidate.counts
        few = counts.examples <= self.requirements.batch_size
        return ClientResources(
            memory=candidate.memory,
            longest=counts.longest,
            cached=cached,
            offload_disk=None if disk is None else disk - (needed if cached else 0),
            batch=min(counts.examples, self.requirements.batch_size),
            one_step=few and self.requirements.epochs == 1,
            rank=candidate.rank,
        )

    def plan(self, candidate: Candidate, stage: Window) -> TurnPlan | None:
        """The best plan of a client for its turns in ``stage``; None if its memory is too small for any window."""
        key = stage, self._within(candidate, stage)
        if key not in self._plans:
            self._plans[key] = plan(self.costs, self.requirements, *key)
        return self._plans[key]

    def fallback_plan(self, candidate: Candidate, stage: Window) -> TurnPlan | None:
        """The plan with less memory for a client that exceeded its best plan; None if no smaller plan exists."""
        best, key = self.plan(candidate, stage), (stage, self._within(candidate, stage))
        if best and key not in self._fallback_plans:
            self._fallback_plans[key] = fallback_plan(self.costs, self.requirements, *key, best)
        return best and self._fallback_plans[key]

    def shortfall(self, candidate: Candidate, stage: Window) -> int:
        """The bytes of memory that a client is short of for the smallest plan in ``stage``."""
        key = stage, self._within(candidate, stage)
        if key not in self._shortfalls:
            self._shortfalls[key] = shortfall(self.costs, self.requirements, *key)
        return self._shortfalls[key]

    def disk_bytes(self, candidate: Candidate, plan: TurnPlan) -> int:
        """The bytes of disk that a client's turns use with ``plan``: the prefix cache and the offloaded activations."""
        return (self._cache_bytes(candidate) if plan.prefix.cached else 0) + plan.offload_bytes

    def _within(self, candidate: Candidate, stage: Window) -> ClientResources:
        """The resources of a client, without a limit of the disk that no plan in ``stage`` reaches.

        The disk that a cache leaves is another for each client. A limit that makes no difference makes no plan of its own.
        """
        resources = self.resources(candidate)
        if resources.offload_disk is None:
            return resources
        key = stage, resources.batch, resources.longest
        if key not in self._most_offloaded:
            self._most_offloaded[key] = saved_bytes(self.costs, self.requirements, *key)
        return (
            replace(resources, offload_disk=None) if resources.offload_disk >= self._most_offloaded[key] else resources
        )

    def _cache_bytes(self, candidate: Candidate) -> int:
        return cache_bytes(self.costs, self.requirements, candidate.counts.examples, candidate.counts.tokens)


@dataclass(frozen=True)
class Admission:
    """Which clients take part, each with its plan for the first stage, and Q, the ``width`` of the job's window.

    ``excluded`` are the clients without a plan, each with its shortfall in bytes.
    """

    admitted: tuple[tuple[Candidate, TurnPlan], ...]
    excluded: tuple[tuple[Candidate, int], ...]
    width: int


def admit(planner: Planner, candidates: Iterable[Candidate], width: int, listen: Listener = no_listener) -> Admission:
    """Separate the clients that can take part from those that cannot, and find Q.

    Clients are planned for the chain's lowest window: it has the most adapters above it, so it needs the most memory. Q is
    ``width`` if any client can train that many adapters together, and otherwise the most that any client can.

    Raises:
        ValueError: ``width`` is below 1.
    """
    candidates = tuple(candidates)
    for narrower in range(width, 0, -1):
        stage = Window(planner.requirements.start, planner.requirements.start + narrower - 1)
        reporter = Reporter(f"planning the clients with windows of {narrower}", listen)
        found = _planned(planner, reporter.each(candidates, len(candidates), "clients"), stage)
        if narrower == 1 or any(len(plan.window) == narrower for _, plan in found.admitted):
            return found
    raise ValueError(f"a window of {width} adapters")


def _planned(planner: Planner, candidates: Iterable[Candidate], stage: Window) -> Admission:
    """Separate the clients that have a plan for ``stage`` from those that have none."""
    plans = [(candidate, planner.plan(candidate, stage)) for candidate in candidates]
    admitted = tuple((candidate, plan) for candidate, plan in plans if plan)
    excluded = tuple((candidate, planner.shortfall(candidate, stage)) for candidate, plan in plans if not plan)
    return Admission(admitted, excluded, len(stage))


def listed(planner: Planner, admission: Admission, stage: Window, totals: FleetTotals) -> Iterator[FleetClient]:
    """The clients of a fleet for the record, with their plans in ``stage``, each as it is added to ``totals``.

    Those that take part come first, in the order of the fleet, and then the others.
    """
    for candidate, _ in admission.admitted:
        plan = planner.plan(candidate, stage)
        assert plan, "an admitted client has a plan for the window that needs the most memory"
        alone = AdmittedClients(
            client_class=candidate.client_class,
            clients=1,
            examples=candidate.counts.examples,
            budget_bytes=candidate.memory,
            planned_bytes=plan.planned_bytes,
            disk_bytes=planner.disk_bytes(candidate, plan),
            window=len(plan.window),
            batch=min(candidate.counts.examples, planner.requirements.batch_size),
            micro_batch=plan.micro_batch,
            weights=plan.weights,
            activations_offloaded=plan.activations == "offloaded",
            activations_recomputed=plan.activations == "recomputed",
            cached=plan.prefix.cached,
            rank=plan.rank,
        )
        yield totals.admit(candidate.name, alone)
    for candidate, lacking in admission.excluded:
        yield totals.exclude(
            FleetClient(
                client=candidate.name,
                client_class=candidate.client_class,
                examples=candidate.counts.examples,
                budget_bytes=candidate.memory,
                shortfall_bytes=lacking,
            )
        )


def requirements_of(chain: ChainSpec, rounds: RoundsSpec, start: int) -> TurnRequirements:
    """What a job asks of every client's turn, if its chain's lowest layer is ``start``.

    A start that is not known yet is 0 (``JobSpec.lowest_start``): from the first layer on, a turn needs the most memory.
    """
    global_branch = chain.stand_in_weight > 0
    return TurnRequirements(
        start=start,
        batch_size=rounds.batch_size,
        epochs=rounds.local_steps or rounds.local_epochs,
        global_branch=global_branch,
        trains_above=global_branch and chain.global_trains == "upper",
        profiles=chain.profile_examples if chain.start == "auto" else 0,
        fits_head=chain.head == "fitted",
        rank=chain.adapter.rank if chain.adapter.kind == "lora" else 0,
        exact=chain.look_ahead == "exact",
    )


@dataclass(frozen=True)
class Latecomers:
    """Takes in clients of ``fleet`` whose site comes after the job has begun. ``stage`` is the chain's lowest window.

    The head has the ``classes`` with which the job began. A site with rows of others takes no part. In a ``private`` job a site
    is one client.
    """

    fleet: FleetSpec
    private: bool
    planner: Planner
    stage: Window
    classes: tuple[str, ...]

    def of(self, answers: Mapping[str, Survey | Absence]) -> tuple[LateSite, ...]:
        """Who takes part of the classes of clients whose sites gave ``answers``, in the order of the fleet."""
        groups = (group for group in self.fleet.at_sites if group.name in answers)
        return tuple(self._site(group, answers[group.name]) for group in groups)

    def joined(self, admission: Admission, late: Iterable[LateSite]) -> Admission:
        """The ``admission`` with the clients of ``late`` sites, as they are on record.

        Raises:
            InvalidJob: another number of them have a plan than when they came.
        """
        groups = {group.name: group for group in self.fleet.at_sites}
        for site in late:
            counts = (ExampleCounts(each.examples, each.longest, each.tokens) for each in site.clients)
            survey = Survey(tuple(ClientSurvey(each, {}) for each in counts))
            more = _planned(self.planner, at_site(groups[site.client_class], survey, self.classes), self.stage)
            if (then := sum(group.clients for group in site.admitted)) != len(more.admitted):
                expected = f"{then} of {site.client_class}, as when their site came"
                raise InvalidJob.at("fleet.clients", f"{len(more.admitted)} that can take part", expected)
            admitted, excluded = admission.admitted + more.admitted, admission.excluded + more.excluded
            admission = replace(admission, admitted=admitted, excluded=excluded)
        return admission

    def _site(self, group: ClientClass, answer: Survey | Absence) -> LateSite:
        assert group.site is not None, "a class of clients at a site"
        name = group.name
        told = {one for client in answer.clients for one in client.classes} if isinstance(answer, Survey) else set()
        if self.classes and (others := told - set(self.classes)):
            words = "it has rows of classes that the job did not have when it began"
            answer = Absence(f"{words} ({some_of(sorted(others))}); `data.classes` lists such classes beforehand")
        if self.private and isinstance(answer, Survey) and len(answer.clients) > 1:
            answer = Absence(f"it makes {len(answer.clients)} clients of its file, and ε was computed with one for it")
        if isinstance(answer, Absence):
            return LateSite(client_class=name, site=group.site, excluded=absent_clients(self.fleet, {name: answer}))
        members, totals = tuple(at_site(group, answer, self.classes)), FleetTotals()
        lines = listed(self.planner, _planned(self.planner, members, self.stage), self.stage, totals)
        plans = {line.client: line.model_dump(include={"planned_bytes", "plan", "shortfall_bytes"}) for line in lines}
        clients = [LateClient(client=each.name, **asdict(each.counts), **plans[each.name]) for each in members]
        return LateSite(
            client_class=name,
            site=group.site,
            clients=tuple(clients),
            admitted=totals.admitted,
            excluded=totals.excluded,
        )
