"""Where clients' turns run: the protocol ``ClientPool``, and ``LocalPool``, which runs them in this process.

The algorithm sees the protocol only, so it never knows how clients run. ``cluster/pool`` has the pool on Ray.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

from pydantic import Field

from chainfed_ray.activity import Note
from chainfed_ray.client.messages import Client, TurnOrder, TurnResult
from chainfed_ray.client.turn import take_turn
from chainfed_ray.errors import BudgetExceeded
from chainfed_ray.model.source import ModelSource
from chainfed_ray.record import Record
from chainfed_ray.units import format_bytes

_WORDS = 1000  # the most characters of an error


@dataclass(frozen=True)
class Failure:
    """A turn that failed, and the ``reason``. ``exceeded`` is true if the turn would have held more memory than its cap."""

    reason: str
    exceeded: bool = False

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """The failure of a turn that raised ``error``. What a client's error says goes on record: cut, and as text that can."""
        words = f"{type(error).__name__}: {error}"[:_WORDS].encode(errors="replace").decode()
        return cls(words, isinstance(error, BudgetExceeded))

    @classmethod
    def late(cls, deadline: float, why: str = "") -> "Failure":
        """The failure of a turn that was not finished after ``deadline`` seconds; ``why`` is the cause, if it is known."""
        return cls(f"missed the deadline of {deadline:g} s" + (f": {why}" if why else ""))


class UnmetDemand(Record):
    """A class of clients for which no machine is there, and none can be added: the data of an event ``no_machine``."""

    client_class: str = Field(description="the class of the clients")
    budget_bytes: int = Field(description="the memory that such a client may use")
    idle_bytes: int = Field(description="what its process takes beside that")
    largest_bytes: int | None = Field(
        description="the most that a client may use on a machine that is there now; null if there is no machine for clients"
    )

    @property
    def reason(self) -> str:
        """Why the turn of such a client fails."""
        there = (
            "no machine for clients is there now"
            if self.largest_bytes is None
            else f"the largest that is there now has {format_bytes(self.largest_bytes)} for a client"
        )
        return (
            f"no machine that the cluster has or can add has the {format_bytes(self.budget_bytes)} that a client of class "
            f"{self.client_class} may use, and {format_bytes(self.idle_bytes)} for its idle process; {there}"
        )


Tell = Callable[[UnmetDemand], None]
"""Receives each class of clients for which there is never room, once."""


class Need(NamedTuple):
    """What a pool will be asked for: turns of so many ``clients`` of a class, each of which may use ``budget_bytes``."""

    client_class: str
    budget_bytes: int
    clients: int


Foresee = Callable[[], Sequence[Need]]
"""Gives the needs, if a pool wants to know them: to know them takes time that grows with the fleet."""


class Outcome(NamedTuple):
    """The result or failure of one turn. ``place`` is the index of its client among those that were given the order."""

    place: int
    result: TurnResult | Failure


def in_order(outcomes: Iterable[Outcome], count: int) -> Iterator[Outcome]:
    """The outcomes in the order of their places. Each is given as soon as all outcomes before it have arrived.

    Raises:
        RuntimeError: the places 0 to ``count`` − 1 do not all arrive.
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


def as_they_come(outcomes: Iterable[Outcome], count: int) -> Iterator[Outcome]:
    """The outcomes in the order of their arrival. None is held here.

    Raises:
        RuntimeError: the places 0 to ``count`` − 1 do not all arrive, or one arrives twice.
    """
    due = set(range(count))
    for outcome in outcomes:
        if outcome.place not in due:
            raise RuntimeError(f"the pool gave an outcome for place {outcome.place} of {count} that is not due")
        due.remove(outcome.place)
        yield outcome
        del outcome
    if due:
        raise RuntimeError(f"the pool gave {count - len(due)} outcomes for {count} clients")


class ClientPool(Protocol):
    """Runs clients' turns. Write one of your own: docs/python.md."""

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """Give ``order`` to ``clients``, and give one outcome for each, in any order.

        A turn that is not finished after ``deadline`` seconds is a failure. If that is infinite, a turn may take as long as it
        works. No exception of a turn is raised here.
        """
        ...

    def expect(self, foresee: Foresee) -> None:
        """Hear what the next calls of ``run`` are likely to need; no needs say that there are none.

        A pool may get ready for them and let go of what is not needed, or ignore it.
        """
        ...

    def close(self) -> None:
        """Release everything that the pool holds."""
        ...


MakePool = Callable[[ModelSource, Note], ClientPool]
"""Makes the pool that runs the clients' turns. The pool may use the ``Note`` to tell what it waits for."""


class LocalPool:
    """Runs turns one after the other in this process, where a debugger can stop in them. Other pools are tested against it.

    Turns are measured, but not held to their budgets: the cap is on the whole process, which does other work too.
    """

    def __init__(self, base: ModelSource) -> None:
        self._base = base

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """Give one outcome for each client, in their order.

        A turn can miss ``deadline`` only by the simulated slowness of its client: the process works on it all the time.
        """
        for place, client in enumerate(clients):
            started = perf_counter()
            try:
                result: TurnResult | Failure = take_turn(client, self._base, lambda: order, capped=False)
            except Exception as error:  # any error costs this turn only: it is recorded as a failed turn
                result = Failure.of(error)
            if client.speed < 1 and (perf_counter() - started) / client.speed > deadline:
                result = Failure.late(deadline)
            yield Outcome(place, result)

    def expect(self, foresee: Foresee) -> None:
        """Do nothing: there is nothing to get ready."""

    def close(self) -> None:
        """Do nothing: the pool holds nothing between turns."""
