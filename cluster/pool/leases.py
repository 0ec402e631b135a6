"""The actors of a pool, each leased to one client at a time. Each serves one budget class, and at most ``slots`` exist.

An actor reserves the memory of its class as a Ray resource. Starting one takes seconds, so an idle actor is kept for the next
turn of its class, and turns wait a little for a busy one. An idle actor is ended when another class has no actor, or far too
few.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import ray
from ray._private.state import actors  # the public one needs a dashboard
from ray.exceptions import RayError

from chainfed_ray.client.messages import Client
from chainfed_ray.client.pool import Need
from chainfed_ray.cluster.pool.actors import ClientActor
from chainfed_ray.cluster.pool.caches import Caches
from chainfed_ray.cluster.resources import IDLE_BYTES, client_options
from chainfed_ray.cluster.structured_logs import what_lines_are_about
from chainfed_ray.model.source import ModelSource
from chainfed_ray.units import format_bytes

_KEEP_SECONDS = 60.0  # how long an actor stays idle whose class is not needed: less than a machine takes to come again
_QUEUE = 3  # how many turns per actor wait in a class, before an idle actor of another class is ended for it


@dataclass(eq=False)
class Lease:
    """An actor, leased to one client at a time."""

    actor: Any  # has the methods of ``ClientActor``
    client_class: str
    memory: int  # bytes that the actor reserves
    ready: Any  # Ray's reference that resolves when the process has started
    located: Any = None  # Ray's reference to the id of its machine
    made_at: float = field(default_factory=monotonic)
    placed: bool = False
    idle_since: float = 0.0
    kept: bool = True  # for the next turn of its class
    known_node: str | None = None

    def is_placed(self) -> bool:
        """True once Ray has found a machine for the actor and its process has started."""
        if not self.placed:
            ready, _ = ray.wait([self.ready], timeout=0)
            self.placed = bool(ready)
        return self.placed

    def has_machine(self, given_room: Callable[[int], bool]) -> bool:
        """True once Ray has a machine for the actor, also if its process never starts or answers. Ray's head is asked.

        ``given_room`` is ``autoscaler.has_been_given_room``.
        """
        if not self.kept:
            return False
        known = actors(self.actor._actor_id.hex())  # it has an address before, of the machine that is asked for room
        return bool(known.get("Pid")) or given_room(self.memory)

    @property
    def node(self) -> str | None:
        """Ray's id of the machine where the actor runs; None if it has not started, or runs at a site."""
        if self.known_node is None and self.located is not None:
            known, _ = ray.wait([self.located], timeout=0)
            if known:
                with suppress(RayError):  # it died before it could say
                    self.known_node = ray.get(self.located)
                self.located = None
        return self.known_node

    def start(self, client: Client, order: Any) -> Any:
        """Begin the turn of ``client``; ``order`` is Ray's reference to what it is to do. Gives the reference to the result."""
        return self.actor.take_turn.remote(client, [order], dict(what_lines_are_about()))

    def ask(self) -> Any:
        """Ask how far the turn is. Gives Ray's reference to a ``Progress``."""
        return self.actor.progress.remote()

    def why_waiting(self) -> str:
        """Why the turn has not begun."""
        return f"no machine with {format_bytes(self.memory)} was free for it"

    def end(self) -> None:
        """End the actor."""
        ray.kill(self.actor)


LeaseOfSite = Callable[[Client], Lease]
"""Gives a lease for one turn of a client at a site. It takes no slot: the site decides how many turns it takes at once."""


class Leases:
    """Makes actors that take turns on the model ``base``, keeps those that are idle, and ends those that are not needed."""

    def __init__(self, base: ModelSource, slots: int, at_site: LeaseOfSite | None = None) -> None:
        self._base, self._slots, self._at_site = base, slots, at_site
        self._idle: list[Lease] = []
        self._made: Counter[str] = Counter()
        self._caches = Caches()

    def lease(self, client: Client, wanted: Mapping[str, int]) -> Lease | None:
        """An idle or new actor for ``client``; None if it has to wait. ``wanted`` counts the other waiting turns by class."""
        if client.remote:
            assert self._at_site, "a job with clients at sites has what stands for them"
            return self._at_site(client)
        of_class = (lease for lease in self._idle if lease.client_class == client.client_class)
        # One that runs comes before one that has no machine yet: no turn waits for a cache.
        own = min(
            of_class, key=lambda lease: (not lease.is_placed(), self._caches.cost(client, lease.node)), default=None
        )
        if own:
            self._idle.remove(own)
            own.made_at = own.made_at if own.placed else monotonic()  # nobody has waited for it so far
            return own
        if sum(self._made.values()) >= self._slots:
            if wanted[client.client_class] < _QUEUE * self._made[client.client_class]:
                return None
            spare = next((lease for lease in self._idle if not wanted.get(lease.client_class)), None)
            if spare is None:
                return None
            self._idle.remove(spare)
            self.end(spare)
        return self._new(client.client_class, client.budget_bytes)

    def loss(self, client: Client, lease: Lease) -> int:
        """What ``client`` would lose if it took its turn with ``lease`` (see ``Caches.cost``). One at a site is its own."""
        return self._caches.cost(client, lease.node) if lease.kept else 0

    def give_back(self, lease: Lease, client: Client) -> None:
        """Keep an actor for the next turn of its class: that of ``client`` has ended."""
        if lease.kept:
            self._caches.note(client, lease.node)
            lease.idle_since = monotonic()
            self._idle.append(lease)

    def end(self, lease: Lease) -> None:
        """End an actor that is leased: its process died, or is given up."""
        lease.end()
        if lease.kept:
            self._made[lease.client_class] -= 1

    def lose(self, node: str) -> None:
        """Forget the idle actors of a machine that is gone."""
        for lease in [lease for lease in self._idle if lease.node == node]:
            self._idle.remove(lease)
            self.end(lease)

    def make_ahead(self, needs: Sequence[Need]) -> None:
        """Make the actors that will be needed, as far as there are places: so machines are there when turns begin.

        Each class has one before another has its second.
        """
        lacking = [need for need in needs if self._made[need.client_class] < need.clients]
        while lacking and sum(self._made.values()) < self._slots:
            need = min(lacking, key=lambda need: self._made[need.client_class])
            made = self._new(need.client_class, need.budget_bytes)
            made.idle_since = monotonic()
            self._idle.append(made)
            lacking = [need for need in lacking if self._made[need.client_class] < need.clients]

    def let_go(self, needs: Sequence[Need]) -> None:
        """End idle actors of classes that are not needed, after a while; at once if nothing is needed any more."""
        needed, now = {need.client_class for need in needs}, monotonic()
        patience = _KEEP_SECONDS if needs else 0.0
        for lease in list(self._idle):
            if lease.client_class not in needed and now - lease.idle_since >= patience:
                self._idle.remove(lease)
                self.end(lease)

    def end_idle(self) -> None:
        """End every idle actor."""
        while self._idle:
            self.end(self._idle.pop())

    def _new(self, client_class: str, budget_bytes: int) -> Lease:
        actor_class: Any = ClientActor  # ray.remote adds `options`, which the type does not show
        actor = actor_class.options(**client_options(budget_bytes)).remote(self._base)
        self._made[client_class] += 1
        return Lease(actor, client_class, IDLE_BYTES + budget_bytes, actor.prepare.remote(), actor.node.remote())
