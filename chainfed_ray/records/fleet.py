"""Who takes part in a job: every client on a line of a file, and all of them added up by class and plan.

A fleet may have a hundred thousand clients. So the record of a job's start has the sums, and the file is read in pages.
"""

import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path

from pydantic import ValidationError

from chainfed_ray.budget.footprint import WeightPlacement
from chainfed_ray.errors import CorruptCommit
from chainfed_ray.record import Record
from chainfed_ray.units import format_bytes

CLIENTS_FILE = "clients.jsonl"

Weights = WeightPlacement
"""Where the weights of a turn's layers are: in memory, or read in slices."""


class FleetClient(Record):
    """A client of the fleet. If it takes part, ``plan`` is the place of its plan in ``JobStarted.admitted``, from 0.

    Behind those come the plans of each site that came late, in the order in which they came.

    ``planned_bytes`` is the most memory that its turns need. A client that cannot take part has neither: its budget is
    ``shortfall_bytes`` too small for every plan.
    """

    client: str
    client_class: str
    examples: int
    budget_bytes: int
    planned_bytes: int | None = None
    plan: int | None = None
    shortfall_bytes: int | None = None


class AdmittedClients(Record):
    """Clients of one class that take part with equal plans for the chain's lowest window, which needs the most memory.

    ``clients`` is their number, and ``examples`` are of all of them. ``planned_bytes`` and ``disk_bytes`` are those of the
    client that needs the most. ``batch`` is the number of examples in a client's largest batch. ``rank`` counts the ranks of
    each LoRA that a client trains, the first ones; None means all.
    """

    client_class: str
    clients: int
    examples: int
    budget_bytes: int
    planned_bytes: int
    disk_bytes: int
    window: int
    batch: int
    micro_batch: int
    weights: Weights
    activations_offloaded: bool
    activations_recomputed: bool = False
    cached: bool
    rank: int | None = None


class ExcludedClients(Record):
    """Clients of one class that cannot take part: a budget is up to ``shortfall_bytes`` too small for every plan.

    Those whose site did not come in time ``may_come`` later.
    """

    client_class: str
    clients: int
    budget_bytes: int
    shortfall_bytes: int
    reason: str
    may_come: bool = False


class LateClient(Record):
    """A client at a site that came late: how many examples it has, and the tokens of the longest and of all.

    ``plan`` is the place of its plan in ``LateSite.admitted``; for the rest see ``FleetClient``. Earlier versions have none.
    """

    client: str
    examples: int
    longest: int
    tokens: int
    planned_bytes: int | None = None
    plan: int | None = None
    shortfall_bytes: int | None = None


class LateSite(Record):
    """A class of clients whose site came after the job had begun: who takes part from a round on, and who cannot.

    ``clients`` are all of them, in the order of the site's parts; none if the site itself takes no part.
    """

    client_class: str
    site: str
    clients: tuple[LateClient, ...] = ()
    admitted: tuple[AdmittedClients, ...] = ()
    excluded: tuple[ExcludedClients, ...] = ()

    def listed(self, before: int) -> Iterator[FleetClient]:
        """Its clients as lines of the fleet, in which ``before`` plans come before its own."""
        budgets = [*(group.budget_bytes for group in self.admitted), *(group.budget_bytes for group in self.excluded)]
        for client in self.clients:
            yield FleetClient(
                client=client.client,
                client_class=self.client_class,
                examples=client.examples,
                budget_bytes=budgets[0],  # a class has one
                planned_bytes=client.planned_bytes,
                plan=None if client.plan is None else before + client.plan,
                shortfall_bytes=client.shortfall_bytes,
            )


def late_clients(plans: int, late: Iterable[LateSite]) -> Iterator[FleetClient]:
    """The clients of sites that came ``late`` to a job that began with so many ``plans``, as lines of its fleet."""
    for site in late:
        yield from site.listed(plans)
        plans += len(site.admitted)


class FleetTotals:
    """Adds up the clients of a fleet, one by one."""

    def __init__(self) -> None:
        self._admitted: dict[tuple[object, ...], tuple[int, AdmittedClients]] = {}
        self._excluded: dict[tuple[str, int], tuple[int, int]] = {}
        self._hash = sha256()

    def admit(self, client: str, alone: AdmittedClients) -> FleetClient:
        """Add a ``client`` that takes part, whose plan is that of ``alone``; give its line in the list."""
        largest = {"clients", "examples", "planned_bytes", "disk_bytes"}
        key = tuple(value for name, value in alone if name not in largest)
        place, group = self._admitted.get(key, (len(self._admitted), None))
        self._admitted[key] = place, alone if group is None else _together(group, alone)
        self._hash.update(_line(client))
        return FleetClient(
            client=client,
            client_class=alone.client_class,
            examples=alone.examples,
            budget_bytes=alone.budget_bytes,
            planned_bytes=alone.planned_bytes,
            plan=place,
        )

    def exclude(self, client: FleetClient) -> FleetClient:
        """Add a ``client`` that cannot take part, and give it back: it is its line in the list."""
        key = client.client_class, client.budget_bytes
        count, most = self._excluded.get(key, (0, 0))
        self._excluded[key] = count + 1, max(most, client.shortfall_bytes or 0)
        return client

    @property
    def admitted(self) -> tuple[AdmittedClients, ...]:
        """The clients that take part, by class and plan."""
        return tuple(group for _, group in self._admitted.values())

    @property
    def excluded(self) -> tuple[ExcludedClients, ...]:
        """The clients that cannot take part, by class."""
        return tuple(
            ExcludedClients(
                client_class=name,
                clients=count,
                budget_bytes=budget,
                shortfall_bytes=most,
                reason=f"a budget of {format_bytes(budget)} is up to {format_bytes(most)} short of the smallest window",
            )
            for (name, budget), (count, most) in self._excluded.items()
        )

    @property
    def hash(self) -> str:
        """The ``names_hash`` of the clients that take part."""
        return self._hash.hexdigest()


def names_hash(names: Iterable[str]) -> str:
    """The sha256 of the ``names`` in their order, each as a line of JSON, in hexadecimal."""
    digest = sha256()
    for name in names:
        digest.update(_line(name))
    return digest.hexdigest()


def clients_in(
    folder: Path, after: int = 0, limit: int | None = None, late: Iterable[FleetClient] = ()
) -> list[FleetClient]:
    """At most ``limit`` clients of the list in a job's ``folder``, without the first ``after``. Empty before the job started.

    Those that came ``late`` are behind them. They are not looked at if the page ends before.

    Raises:
        CorruptCommit: the file is not what was written.
    """
    path = folder / CLIENTS_FILE
    try:
        with path.open("rb") as file:
            everybody = chain(map(FleetClient.model_validate_json, file), late)
            return list(islice(everybody, after, None if limit is None else after + limit))
    except FileNotFoundError:
        return []
    except ValidationError as error:
        raise CorruptCommit(str(path), "it is not what was written") from error


def _together(group: AdmittedClients, alone: AdmittedClients) -> AdmittedClients:
    sums = {"clients": group.clients + alone.clients, "examples": group.examples + alone.examples}
    most = {name: max(getattr(group, name), getattr(alone, name)) for name in ("planned_bytes", "disk_bytes")}
    return group.model_copy(update=sums | most)


def _line(name: str) -> bytes:
    return json.dumps(name).encode() + b"\n"
