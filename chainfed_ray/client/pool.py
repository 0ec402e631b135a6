"""Who carries out the clients' turns. The algorithm sees a ``ClientPool`` and never knows which."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

from chainfed_ray.client.messages import Client, TurnOrder, TurnResult
from chainfed_ray.client.turn import take_turn
from chainfed_ray.errors import BudgetExceeded
from chainfed_ray.model.source import ModelSource


@dataclass(frozen=True)
class Failure:
    """A turn that gave nothing, and why; ``exceeded`` if it would have taken more memory than it was allowed."""

    reason: str
    exceeded: bool = False

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """The failure that an error means."""
        return cls(f"{type(error).__name__}: {error}", isinstance(error, BudgetExceeded))

    @classmethod
    def late(cls, deadline: float, why: str = "") -> "Failure":
        """The failure of a turn that was not done after ``deadline`` seconds."""
        return cls(f"missed the deadline of {deadline:g} s" + (f": {why}" if why else ""))


class Outcome(NamedTuple):
    """How the turn of the client at ``place`` in the round ended."""

    place: int
    result: TurnResult | Failure


def in_order(outcomes: Iterable[Outcome], count: int) -> Iterator[Outcome]:
    """Outcomes by place, each as soon as those before it are there.

    Raises:
        RuntimeError: there are not ``count`` of them.
    """
    waiting: dict[int, Outcome] = {}
    due = 0
    for outcome in outcomes:
        waiting[outcome.place] = outcome
        while due in waiting:
            yield waiting.pop(due)
            due += 1
    if due != count:
        raise RuntimeError(f"the pool gave {due} outcomes for {count} clients")


class ClientPool(Protocol):
    """Runs turns, somewhere."""

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """One outcome for each client, in any order; those not done after ``deadline`` seconds are failures."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class LocalPool:
    """Turns one after the other in this process: the debugger, and the oracle that other pools are tested against.

    They are measured, but not held to their budgets: the process has other things to do.
    """

    def __init__(self, base: ModelSource) -> None:
        self._base = base

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """One outcome for each client, in their order. There is nobody to wait for, so only simulated slowness is late."""
        for place, client in enumerate(clients):
            started = perf_counter()
            try:
                result: TurnResult | Failure = take_turn(client, self._base, lambda: order, capped=False)
            except Exception as error:  # whatever goes wrong costs this turn only, and is on record
                result = Failure.of(error)
            if client.speed < 1 and (perf_counter() - started) / client.speed > deadline:
                result = Failure.late(deadline)
            yield Outcome(place, result)

    def close(self) -> None:
        """Nothing is held between turns."""
