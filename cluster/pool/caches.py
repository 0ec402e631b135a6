"""Which machine has a client's prefix cache: its next turn is faster there, and takes no disk elsewhere.

It is a preference among actors that are free. No turn waits for it, and the bits of a result do not depend on it.
"""

from chainfed_ray.client.messages import Client


class Caches:
    """The machine on which each client took its last turn, by Ray's ids. Its prefix cache lies there."""

    def __init__(self) -> None:
        self._nodes: dict[str, str] = {}

    def note(self, client: Client, node: str | None) -> None:
        """Note that ``client`` has taken a turn on ``node``; None if that is not known, or at a site."""
        if node is not None:
            self._nodes[client.name] = node

    def cost(self, client: Client, node: str | None) -> int:
        """What a turn of ``client`` on ``node`` would lose: 0 nothing, 2 a cache elsewhere, and 1 if either is not known."""
        home = self._nodes.get(client.name)
        if home is None or node is None:
            return 1
        return 0 if home == node else 2
