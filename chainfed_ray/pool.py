"""Who carries out the clients' turns. The algorithm sees a ``ClientPool`` and never knows which."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from chainfed_ray.client import BaseModel, Client, Order, Profile, Update
from chainfed_ray.errors import BudgetExceeded
from chainfed_ray.turn import take_turn


@dataclass(frozen=True)
class Failure:
    """A turn that gave nothing, and why; ``exceeded`` if it would have taken more memory than it was allowed."""

    reason: str
    exceeded: bool = False

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """The failure that an error means."""
        return cls(f"{type(error).__name__}: {error}", isinstance(error, BudgetExceeded))


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
    """Turns one after the other in this process: the debugger, and the oracle that other pools are tested against.

    They are measured, but not held to their budgets: the process has other things to do.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    def run(self, clients: Sequence[Client], order: Order, deadline: float) -> Iterator[Outcome]:
        """One outcome for each client, in their order. There is nobody to wait for, so no deadline."""
        for place, client in enumerate(clients):
            try:
                result: Profile | Update | Failure = take_turn(client, self._base, lambda: order, capped=False)
            except Exception as error:  # whatever goes wrong costs this turn only, and is on record
                result = Failure.of(error)
            yield Outcome(place, result)

    def close(self) -> None:
        """Nothing is held between turns."""
