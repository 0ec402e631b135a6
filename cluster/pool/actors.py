"""The Ray actor that runs clients' turns. It only forwards to ``client.turn``, which computes them.

Turns run in one thread of the process, in which ``prepare`` runs before: libraries keep buffers for each thread. Another thread
answers how far the turn is.
"""

from typing import Any

import ray

from chainfed_ray.client.messages import Client, TurnResult
from chainfed_ray.client.progress import Progress, progress
from chainfed_ray.client.turn import slowed, take_turn, warm_up
from chainfed_ray.cluster.occupancy import occupy
from chainfed_ray.cluster.pool.orders import receive
from chainfed_ray.device.lean_imports import load_models
from chainfed_ray.model.source import ModelSource


def ready(base: ModelSource) -> None:
    """Load the libraries that turns need, and no others.

    What they allocate on first use then counts as the idle process, not as a client's memory.
    """
    load_models()
    warm_up(base)


@ray.remote(concurrency_groups={"asked": 1})  # type: ignore[call-overload]  # its types lack this option
class ClientActor:
    """A process that runs turns for one client at a time, all of one budget class. It keeps nothing between turns."""

    def __init__(self, base: ModelSource) -> None:
        self._base = base
        self._lock = occupy(base.scratch)  # as long as this process lives, it may write there

    def prepare(self) -> None:
        """Get ready for turns: once, before the first."""
        ready(self._base)

    @ray.method(concurrency_group="asked")
    def node(self) -> str:
        """Ray's id of the machine where this process runs."""
        where: str = ray.get_runtime_context().get_node_id()
        return where

    @ray.method(concurrency_group="asked")
    def progress(self) -> Progress:
        """How far the turn is that runs now."""
        return progress()

    def take_turn(self, client: Client, order: list[Any]) -> TurnResult:
        """Run a turn for ``client``, limited to its memory budget and slowed to the speed of its machine.

        ``order`` is a list with a reference. Ray would fetch a bare reference before the call; in a list, it is fetched within
        the turn, whose memory it belongs to.
        """
        with slowed(client.speed):
            return take_turn(client, self._base, lambda: receive(order[0]), capped=True)
