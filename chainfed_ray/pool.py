"""Who carries out the clients' turns. The algorithm sees a ``ClientPool`` and never knows which."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from chainfed_ray.client import BaseModel, Client, Order, Profile, Update, take_turn


@dataclass(frozen=True)
class Failure:
    """A turn that gave nothing, and why."""

    reason: str


class Outcome(NamedTuple):
    """How the turn of the client at ``place`` in the round ended."""

    place: int
    result: Profile | Update | Failure


class ClientPool(Protocol):
    """Runs turns, somewhere."""

    def run(self, clients: Sequence[Client], order: Order, deadline: float) -> Iterator[Outcome]:
        """One outcome for each client, in any order; those not done after ``deadline`` seconds are failures."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class LocalPool:
    """Turns one after the other in this process: the debugger, and the oracle that other pools are tested against."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    def run(self, clients: Sequence[Client], order: Order, deadline: float) -> Iterator[Outcome]:
        """One outcome for each client, in their order. There is nobody to wait for, so no deadline."""
        for place, client in enumerate(clients):
            try:
                result: Profile | Update | Failure = take_turn(client, self._base, order)
            except Exception as error:  # whatever goes wrong costs this turn only, and is on record
                result = Failure(f"{type(error).__name__}: {error}")
            yield Outcome(place, result)

    def close(self) -> None:
        """Nothing is held between turns."""
