"""The clients' turns as calls of Ray actors, leased by budget class.

There are at most ``width`` actors of a class, each with the memory of its class as a Ray resource. An actor whose client
died or missed the deadline is given up, and its place is taken by a new one when a turn next needs it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from chainfed_ray.client import BaseModel, Client, Order
from chainfed_ray.pool import Failure, Outcome
from cluster.actors import ClientActor

# What an actor's process takes before any client uses it: Python, torch and Ray.
IDLE_BYTES = 400 * 2**20

_POLL_SECONDS = 1.0


class RayPool:
    """Runs turns on the Ray cluster that this process is connected to, ``width`` at a time for each class."""

    def __init__(self, base: BaseModel, width: int) -> None:
        self._base, self._width = base, width
        self._idle: dict[str, list[Any]] = {}
        self._made: dict[str, int] = {}

    def run(self, clients: Sequence[Client], order: Order, deadline: float) -> Iterator[Outcome]:
        """One outcome for each client, as they arrive."""
        ends = monotonic() + deadline
        order_reference = ray.put(order)  # sent to each node once, not to each client
        waiting = deque(enumerate(clients))
        running: dict[Any, tuple[int, Client, Any]] = {}
        try:
            while waiting or running:
                for place, client in self._startable(waiting):
                    actor = self._lease(client)
                    running[actor.take_turn.remote(client, self._base, order_reference)] = (place, client, actor)
                left = ends - monotonic()
                if left <= 0:
                    break
                done, _ = ray.wait(list(running), timeout=min(left, _POLL_SECONDS))
                for reference in done:
                    yield self._outcome(reference, *running.pop(reference))
            late = Failure(f"missed the deadline of {deadline:g} s")
            for place, client, actor in running.values():
                self._give_up(client, actor)
                yield Outcome(place, late)
            running.clear()
            for place, _ in waiting:
                yield Outcome(place, late)
        finally:
            # The round was abandoned in the middle: nobody will ask for what is still running.
            for _, client, actor in running.values():
                self._give_up(client, actor)

    def close(self) -> None:
        """End every idle actor."""
        for actors in self._idle.values():
            for actor in actors:
                ray.kill(actor)
        self._idle.clear()
        self._made.clear()

    def _startable(self, waiting: deque[tuple[int, Client]]) -> Iterator[tuple[int, Client]]:
        """Take from ``waiting`` those for whose class an actor is free, or may be made."""
        for _ in range(len(waiting)):
            place, client = waiting.popleft()
            if self._idle.get(client.client_class) or self._made.get(client.client_class, 0) < self._width:
                yield place, client
            else:
                waiting.append((place, client))

    def _lease(self, client: Client) -> Any:
        idle = self._idle.setdefault(client.client_class, [])
        if idle:
            return idle.pop()
        self._made[client.client_class] = self._made.get(client.client_class, 0) + 1
        actor_class: Any = ClientActor  # ray.remote gives it `options`, which its type does not show
        return actor_class.options(num_cpus=0, memory=IDLE_BYTES + client.budget_bytes).remote()

    def _outcome(self, reference: Any, place: int, client: Client, actor: Any) -> Outcome:
        try:
            result = ray.get(reference, timeout=60)
        except RayActorError as error:
            self._give_up(client, actor)
            return Outcome(place, Failure(f"its process died ({type(error).__name__})"))
        except GetTimeoutError:
            self._give_up(client, actor)
            return Outcome(place, Failure("its result could not be fetched within 60 s"))
        except RayTaskError as error:
            self._idle[client.client_class].append(actor)
            return Outcome(place, Failure(f"{type(error.cause).__name__}: {error.cause}"))
        self._idle[client.client_class].append(actor)
        return Outcome(place, result)

    def _give_up(self, client: Client, actor: Any) -> None:
        ray.kill(actor)
        self._made[client.client_class] -= 1
