"""The clients that wait for their turn: who is next, with an actor that is free for it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

from chainfed_ray.client.messages import Client

T = TypeVar("T")
_NEAR = 64  # the first clients of a class, among whom the one is looked for that an actor suits best


class Waiting:
    """Clients that wait, each with its place among those that were given the order: the first in line is the next.

    Clients of one class need the same actors. So when one has to wait, the others of its class are not looked at, and what a
    look costs does not grow with the number of clients.
    """

    def __init__(self, clients: Iterable[tuple[int, Client]]) -> None:
        self._by_class: dict[str, deque[tuple[int, Client]]] = {}
        for place, client in clients:
            self._by_class.setdefault(client.client_class, deque()).append((place, client))
        self.counts = {name: len(queue) for name, queue in self._by_class.items()}

    def __bool__(self) -> bool:
        return any(self.counts.values())

    def startable(
        self,
        lease: Callable[[Client, Mapping[str, int]], T | None],
        loss: Callable[[Client, T], int] = lambda client, actor: 0,
    ) -> Iterator[tuple[int, Client, T]]:
        """Take out each client for which ``lease`` gives an actor, and yield its place, the client and the actor.

        ``lease`` is also given how many others of each class wait. It gives None if the client has to wait. An actor that is
        given goes to the client with the least ``loss`` by it among the first of its class.
        """
        may_start = {name for name, count in self.counts.items() if count}
        while may_start:
            name = min(may_start, key=lambda name: self._by_class[name][0][0])
            self.counts[name] -= 1
            place, client = self._by_class[name][0]
            if actor := lease(client, self.counts):
                near = enumerate(islice(self._by_class[name], _NEAR))
                nearest = min(near, key=lambda found: loss(found[1][1], actor))[0]
                place, client = self._by_class[name][nearest]
                del self._by_class[name][nearest]
                if not self.counts[name]:
                    may_start.remove(name)
                yield place, client, actor
            else:
                self.counts[name] += 1
                may_start.remove(name)

    def again(self, place: int, client: Client) -> None:
        """Put a client first in the line of its class: it has been started, and has to be started anew."""
        self._by_class.setdefault(client.client_class, deque()).appendleft((place, client))
        self.counts[client.client_class] = self.counts.get(client.client_class, 0) + 1

    def take(self, client_class: str) -> list[tuple[int, Client]]:
        """Take out every client of a class, each with its place."""
        self.counts[client_class] = 0
        return list(self._by_class.pop(client_class, ()))

    def first_of_each(self) -> list[Client]:
        """The next client of each class that waits."""
        return [queue[0][1] for queue in self._by_class.values() if queue]

    def places(self) -> list[int]:
        """The places of the clients that still wait."""
        return sorted(place for queue in self._by_class.values() for place, _ in queue)
