"""Runs the clients' turns on Ray actors. Each actor serves one budget class, and at most ``slots`` exist at a time.

An actor reserves the memory of its class as a Ray resource. Starting one takes seconds, so an idle actor is kept for the next
turn of its class, and turns wait a little for a busy one. An idle actor is ended when another class has no actor, or far too
few. An actor is also ended if its process died, or its client missed the deadline.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from chainfed_ray.activity import Note
from chainfed_ray.client.messages import Client, TurnOrder
from chainfed_ray.client.pool import Failure, Outcome
from chainfed_ray.cluster.pool.actors import ClientActor
from chainfed_ray.cluster.pool.orders import send
from chainfed_ray.cluster.resources import IDLE_BYTES, client_options
from chainfed_ray.model.source import ModelSource
from chainfed_ray.units import format_bytes

_POLL_SECONDS = 1.0
_QUEUE = 3  # how many turns per actor wait in a class, before an idle actor of another class is ended for it
# How long an actor may wait for a machine before idle actors are ended to make room. On a busy machine, starting takes ten
# seconds even if there is room. Ending idle actors sooner would make every later round start them again.
_PATIENCE_SECONDS = 30.0


@dataclass(eq=False)
class _Lease:
    """An actor, leased to one client at a time."""

    actor: Any
    client_class: str
    memory: int  # bytes that the actor reserves
    ready: Any  # Ray's reference that resolves when the process has started
    made_at: float = field(default_factory=monotonic)
    placed: bool = False

    def is_placed(self) -> bool:
        """True once Ray has found a machine for the actor and its process has started."""
        if not self.placed:
            ready, _ = ray.wait([self.ready], timeout=0)
            self.placed = bool(ready)
        return self.placed


class RayPool:
    """A ``ClientPool`` on the Ray cluster that this process is connected to. It runs ``slots`` turns at a time.

    ``note`` is told when turns wait for processes to start. That takes seconds, or longer if no machine has room.
    """

    def __init__(self, base: ModelSource, slots: int, note: Note = lambda words: None) -> None:
        self.base, self._slots, self._note = base, slots, note
        self._idle: list[_Lease] = []
        self._made: Counter[str] = Counter()

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """Run ``order`` for each client, for at most ``deadline`` seconds. Yields an outcome for each, in order of arrival."""
        ends = monotonic() + deadline
        reference_to_order = send(order)
        waiting = deque(enumerate(clients))
        running: dict[Any, tuple[int, _Lease]] = {}
        try:
            while waiting or running:
                for place, client, lease in self._startable(waiting):
                    running[lease.actor.take_turn.remote(client, [reference_to_order])] = (place, lease)
                left = ends - monotonic()
                if left <= 0:
                    break
                done, _ = ray.wait(list(running), timeout=min(left, _POLL_SECONDS))
                for reference in done:
                    yield self._outcome(reference, *running.pop(reference))
                self._make_room([lease for _, lease in running.values()])
            for place, lease in list(running.values()):
                why = "" if lease.is_placed() else f"no machine with {format_bytes(lease.memory)} was free for it"
                self._end(lease)
                yield Outcome(place, Failure.late(deadline, why))
            running.clear()
            for place, _ in waiting:
                yield Outcome(place, Failure.late(deadline, "other clients used every process"))
        finally:
            # If the caller stopped iterating in the middle of a round, turns are still running.
            for _, lease in running.values():
                self._end(lease)
            self._note(None)

    def close(self) -> None:
        """End every idle actor."""
        while self._idle:
            self._end(self._idle.pop())

    def _startable(self, waiting: deque[tuple[int, Client]]) -> Iterator[tuple[int, Client, _Lease]]:
        """Take clients from ``waiting`` for which an actor is idle or may be made, and yield each with its actor."""
        wanted = Counter(client.client_class for _, client in waiting)
        for _ in range(len(waiting)):
            if not self._idle and sum(self._made.values()) >= self._slots:
                return  # nobody can start before a turn ends
            place, client = waiting.popleft()
            wanted[client.client_class] -= 1
            if lease := self._lease(client, wanted):
                yield place, client, lease
            else:
                waiting.append((place, client))
                wanted[client.client_class] += 1

    def _lease(self, client: Client, wanted: Counter[str]) -> _Lease | None:
        """An idle or new actor for ``client``; None if it has to wait. ``wanted`` counts the other waiting turns by class."""
        own = next((lease for lease in self._idle if lease.client_class == client.client_class), None)
        if own:
            self._idle.remove(own)
            return own
        if sum(self._made.values()) >= self._slots:
            if wanted[client.client_class] < _QUEUE * self._made[client.client_class]:
                return None
            spare = next((lease for lease in self._idle if not wanted[lease.client_class]), None)
            if spare is None:
                return None
            self._idle.remove(spare)
            self._end(spare)
        self._made[client.client_class] += 1
        actor_class: Any = ClientActor  # ray.remote adds `options`, which the type does not show
        actor = actor_class.options(**client_options(client.budget_bytes)).remote(self.base)
        return _Lease(actor, client.client_class, IDLE_BYTES + client.budget_bytes, actor.__ray_ready__.remote())

    def _make_room(self, running: Sequence[_Lease]) -> None:
        """Report waiting actors. If one has waited too long, end all idle actors: they may hold the memory that it needs."""
        now, waiting = monotonic(), [lease for lease in running if not lease.is_placed()]
        late = [lease for lease in waiting if now - lease.made_at > _PATIENCE_SECONDS]
        self._note(_in_words(len(running), len(waiting), max((lease.memory for lease in late), default=None)))
        if late:
            self.close()

    def _outcome(self, reference: Any, place: int, lease: _Lease) -> Outcome:
        try:
            result = ray.get(reference, timeout=60)
        except RayActorError as error:
            self._end(lease)
            return Outcome(place, Failure(f"its process died ({type(error).__name__})"))
        except GetTimeoutError:
            self._end(lease)
            return Outcome(place, Failure("its result could not be fetched within 60 s"))
        except RayTaskError as error:
            self._idle.append(lease)
            return Outcome(place, Failure.of(error.cause))
        self._idle.append(lease)
        return Outcome(place, result)

    def _end(self, lease: _Lease) -> None:
        ray.kill(lease.actor)
        self._made[lease.client_class] -= 1


def _in_words(running: int, waiting: int, memory: int | None) -> str | None:
    """A note that of ``running`` turns, ``waiting`` ones wait for a process to start; None if none does.

    ``memory`` is what the process needs in bytes, if it has waited for long.
    """
    if not waiting:
        return None
    machine = "" if memory is None else f", with {format_bytes(memory)}"
    return f"waiting for {waiting} of {running} processes{machine}"
