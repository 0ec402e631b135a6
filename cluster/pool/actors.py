"""The Ray actor that takes clients' turns. It forwards, and computes nothing of its own."""

from typing import Any

import ray

from chainfed_ray.client.messages import Client, TurnResult
from chainfed_ray.client.turn import slowed, take_turn, warm_up
from chainfed_ray.cluster.pool.orders import receive
from chainfed_ray.lean_imports import without_scipy
from chainfed_ray.model.source import ModelSource


def ready(base: ModelSource) -> None:
    """Load what clients' turns need, and nothing that they do not: the process stays as it is from then on."""
    with without_scipy():
        warm_up(base)


@ray.remote
class ClientActor:
    """A process that is leased to one client of its budget class at a time; it keeps nothing from turn to turn."""

    def __init__(self, base: ModelSource) -> None:
        self._base = base
        ready(base)

    def take_turn(self, client: Client, order: list[Any]) -> TurnResult:
        """Carry out an order for the client that holds the lease, held to its budget, at the speed of its machine.

        The order comes as a reference in a list, which Ray leaves as it is: it is fetched within the turn that it counts to.
        """
        with slowed(client.speed):
            return take_turn(client, self._base, lambda: receive(order[0]), capped=True)
