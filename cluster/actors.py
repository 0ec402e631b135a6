"""The Ray actor that takes clients' turns. It forwards, and computes nothing of its own."""

import ray

from chainfed_ray.client import BaseModel, Client, Order, Profile, Update, take_turn, warm_up


@ray.remote
class ClientActor:
    """A process that is leased to one client of its budget class at a time; it keeps nothing from turn to turn."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        warm_up(base)

    def take_turn(self, client: Client, order: Order) -> Profile | Update:
        """Carry out an order for the client that holds the lease."""
        return take_turn(client, self._base, order)
