"""The clients of a job's fleet, before they are planned: simulated ones with their rows, those at sites with their counts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from types import MappingProxyType

import numpy as np

from chainfed_ray.budget.planner import TurnPlan
from chainfed_ray.client.messages import Client
from chainfed_ray.client.survey import Absence, SiteRows, Survey
from chainfed_ray.data.examples import JobExamples
from chainfed_ray.data.tokens import NO_EXAMPLES, ExampleCounts, Examples
from chainfed_ray.errors import InvalidJob
from chainfed_ray.problem import some_of
from chainfed_ray.records.fleet import (
    ExcludedClients,
)
from chainfed_ray.spec.fleet import ClientClass, FleetSpec


@dataclass(frozen=True)
class Candidate:
    """A client of the fleet: its examples, and the bytes of memory and disk that it declared.

    ``disk`` is None if the client declared no limit. ``availability`` is the probability that the client answers when it is
    sampled. ``speed`` is at most 1: at 0.5 a turn takes twice as long. ``remote`` says where the rows of a client at a site
    are; it has no ``examples``. ``rank`` is how many of a LoRA's ranks it trains; None: all.
    """

    name: str
    client_class: str
    examples: Examples
    memory: int
    disk: int | None
    availability: float = 1.0
    speed: float = 1.0
    remote: SiteRows | None = None
    rank: int | None = None

    @cached_property
    def counts(self) -> ExampleCounts:
        """How many examples the client has, and how long they are."""
        return self.remote.counts if self.remote else self.examples.counts


def candidates(
    fleet: FleetSpec,
    examples: JobExamples,
    classes: tuple[str, ...],
    shares: Sequence[np.ndarray],
    surveys: Mapping[str, Survey | Absence] = MappingProxyType({}),
) -> list[Candidate]:
    """The clients of a job's fleet. ``shares`` are the row indices of each simulated one, in the order of the fleet.

    ``surveys`` are the answers of sites. A site that takes no part has no clients. ``classes`` are those of the head, by which
    sites number their labels; a language model has none.
    """
    simulated = iter(zip(fleet.members, shares, strict=True))
    found = list[Candidate]()
    for group in fleet.clients:
        survey = surveys.get(group.name)
        if isinstance(survey, Survey):
            found += at_site(group, survey, classes)
        elif group.site is None:
            for (name, _), share in islice(simulated, group.count):
                rows, resources = examples.of_client(share), (group.memory, group.disk, group.availability, group.speed)
                found.append(Candidate(name, group.name, rows, *resources, rank=group.rank))
    return found


def at_site(group: ClientClass, survey: Survey, classes: tuple[str, ...]) -> Iterator[Candidate]:
    """The clients that the site of ``group`` makes of its file. ``classes`` are those of the job's head."""
    assert group.site is not None, "a site was surveyed"
    assert group.data is not None, "the rules refuse a site without a file"
    for part, client in enumerate(survey.clients):
        rows = SiteRows(group.site, group.data, part, len(survey.clients), client.counts, classes)
        name = f"{group.name}-{part}"
        yield Candidate(name, group.name, NO_EXAMPLES, group.memory, group.disk, remote=rows, rank=group.rank)


def classes_at_sites(fleet: FleetSpec, surveys: Mapping[str, Survey | Absence]) -> set[str]:
    """The names of all classes that sites tell of.

    Raises:
        InvalidJob: no site takes part, and there are no other clients.
    """
    answers = [survey for survey in surveys.values() if isinstance(survey, Survey)]
    if surveys and not answers and not fleet.size:
        reasons = some_of((group.reason for group in absent_clients(fleet, surveys)), "; ")
        raise InvalidJob.at("fleet.clients", [*surveys], f"a site that takes part ({reasons})")
    return {name for survey in answers for client in survey.clients for name in client.classes}


def absent_clients(fleet: FleetSpec, surveys: Mapping[str, Survey | Absence]) -> tuple[ExcludedClients, ...]:
    """The classes of clients whose site takes no part, each with its reason."""
    answers = ((group, surveys.get(group.name)) for group in fleet.at_sites)
    return tuple(
        ExcludedClients(
            client_class=group.name,
            clients=group.count,
            budget_bytes=group.memory,
            shortfall_bytes=0,
            reason=f"site {group.site} takes no part{' yet' if answer.may_come else ''}: {answer.reason}",
            may_come=answer.may_come,
        )
        for group, answer in answers
        if isinstance(answer, Absence)
    )


def awaited(fleet: FleetSpec, absent: Sequence[ExcludedClients]) -> list[Candidate]:
    """A client without rows for each site that may still come, of those that are ``absent``.

    A private job keeps these places. Its rounds sample from all clients that may ever take part, or ε would depend on who
    comes. One that has not come fails.
    """
    sites, none = {group.name: group.site for group in fleet.at_sites}, ExampleCounts(0, 0, 0)
    return [
        Candidate(f"{name}-0", name, NO_EXAMPLES, group.budget_bytes, None, remote=SiteRows(site, "", 0, 1, none))
        for group in absent
        if group.may_come and (site := sites[name := group.client_class])
    ]


def as_client(candidate: Candidate, plan: TurnPlan, cap_bytes: int) -> Client:
    """The client that takes the next turn of ``candidate``: with ``plan``, held to ``cap_bytes`` of memory."""
    name, group, examples, memory = candidate.name, candidate.client_class, candidate.examples, candidate.memory
    return Client(name, group, examples, memory, plan, cap_bytes, speed=candidate.speed, remote=candidate.remote)
