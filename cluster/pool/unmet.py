"""Clients for which the cluster never has room: known within seconds, told once, and not waited for.

Their turns fail with the reason, as those of clients that do not answer. So the job goes on if the quorum holds.
"""

from collections.abc import Collection, Sequence
from time import monotonic
from typing import NamedTuple

from chainfed_ray.client.messages import Client
from chainfed_ray.client.pool import Failure, Need, Tell, UnmetDemand
from chainfed_ray.cluster.pool.autoscaler import largest_machine, never_met
from chainfed_ray.cluster.pool.leases import Lease
from chainfed_ray.cluster.pool.placement import never_placed
from chainfed_ray.cluster.resources import IDLE_BYTES

_LOOK_SECONDS = 1.0  # between two questions to the autoscaler
# How long it is known that a class has no machine. Then its clients wait again: a larger group of machines may have been added.
_KNOWN_SECONDS = 60.0


class UnmetDemands:
    """What is known of clients that the cluster can never hold. ``tell`` hears of each class once."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._told = tell, set[str]()
        self._known: dict[int, _Known] = {}  # by the bytes that a process asks for
        self._met: dict[str, str] = {}  # why turns of a class failed since ``among``
        self._looked = 0.0

    def among(self, clients: Sequence[Client]) -> dict[int, Failure]:
        """The failures of those of ``clients`` that are known to have no room, by their places."""
        self._met.clear()
        found = never_placed(clients)
        for place, client in enumerate(clients):
            if place not in found and (failure := self.failure(client)):
                found[place] = failure
        return found

    def can_be_met(self, need: Need) -> bool:
        """Whether it is not known that there is never room for clients of a class."""
        return self._known_of(need.budget_bytes) is None

    def failure(self, client: Client) -> Failure | None:
        """The failure of ``client`` if it is known that there is never room for it."""
        known = None if client.remote else self._known_of(client.budget_bytes)
        if known is None:
            return None
        demand = UnmetDemand(
            client_class=client.client_class,
            budget_bytes=client.budget_bytes,
            idle_bytes=IDLE_BYTES,
            largest_bytes=None if known.largest is None else max(known.largest - IDLE_BYTES, 0),
        )
        self._met[client.client_class] = demand.reason
        if client.client_class not in self._told:
            self._told.add(client.client_class)
            self._tell(demand)
        return Failure(demand.reason)

    def look(self, running: Collection[Lease]) -> bool:
        """Ask the autoscaler if one of ``running`` waits for a machine. True if it says that there will never be one."""
        now = monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return False
        self._looked = now
        waiting = {lease.memory for lease in running if lease.kept and not lease.is_placed()}
        found = waiting & never_met() if waiting else set[int]()
        if found:
            self._known |= dict.fromkeys(found, _Known(now + _KNOWN_SECONDS, largest_machine()))
        return bool(found)

    def in_words(self) -> list[str]:
        """Why classes of the clients that were given last have no machine."""
        return list(self._met.values())

    def _known_of(self, budget_bytes: int) -> "_Known | None":
        needed, now = IDLE_BYTES + budget_bytes, monotonic()
        return next((known for memory, known in self._known.items() if memory <= needed and now < known.until), None)


class _Known(NamedTuple):
    """Until when it is known that a request is never met, and the bytes of the largest machine that was there."""

    until: float
    largest: int | None
