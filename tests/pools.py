"""Pools in which something goes wrong: each is another pool whose clients' answers are altered, lost or overheard."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from chainfed_ray.client.messages import Client, Fitting, HeadSums, Training, TurnOrder, TurnResult, Update
from chainfed_ray.client.pool import ClientPool, Failure, Outcome
from chainfed_ray.errors import BudgetExceeded

Answer = TurnResult | Failure
Alter = Callable[[Client, TurnOrder, Answer], Answer]

_LATE = Failure("missed the deadline")


class Altered:
    """A pool whose answers ``alter`` changes, as they come."""

    def __init__(self, pool: ClientPool, alter: Alter) -> None:
        self._pool, self._alter = pool, alter

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        for place, answer in self._pool.run(clients, order, deadline):
            yield Outcome(place, self._alter(clients[place], order, answer))

    def close(self) -> None:
        """See ``ClientPool``."""
        self._pool.close()


class Backwards(Altered):
    """A pool whose answers come in the opposite order."""

    def __init__(self, pool: ClientPool) -> None:
        super().__init__(pool, lambda client, order, answer: answer)

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        return iter(list(super().run(clients, order, deadline))[::-1])


class Heard(Altered):
    """A pool that alters nothing and keeps all: whom it was asked to run each time, and what a reader of the updates sees."""

    def __init__(self, pool: ClientPool) -> None:
        super().__init__(pool, self._hear)
        self.asked: list[list[str]] = []
        self.updates: list[tuple[Client, Training, Update]] = []

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        self.asked.append([client.name for client in clients])
        yield from super().run(clients, order, deadline)

    def _hear(self, client: Client, order: TurnOrder, answer: Answer) -> Answer:
        if isinstance(answer, Update) and isinstance(order, Training):
            self.updates.append((client, order, answer))
        return answer


class Greedy(Altered):
    """A pool whose clients of some names exceed every plan above ``enough`` bytes.

    Where they are ``modest``, that is so only while they are held to less than what they declared.
    """

    def __init__(self, pool: ClientPool, greedy: Collection[str], enough: int = 0, modest: bool = False) -> None:
        super().__init__(pool, self._exceed)
        self._greedy, self._enough, self._modest = greedy, enough, modest
        self.tried: list[tuple[str, int, int]] = []

    def _exceed(self, client: Client, order: TurnOrder, answer: Answer) -> Answer:
        needed, cap = client.plan.planned_bytes, client.cap_bytes
        if client.name not in self._greedy:
            return answer
        self.tried.append((client.name, needed, cap))
        if needed <= self._enough or (self._modest and cap == client.budget_bytes):
            return answer
        return Failure.of(BudgetExceeded(needed, cap, None, "training"))


class Killed(BaseException):
    """The end of a process, as far as it can be had within one: nothing in the code may catch it."""


class Nobody:
    """A pool that no client answers."""

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        return iter([Outcome(place, _LATE) for place in range(len(clients))])

    def close(self) -> None:
        """See ``ClientPool``."""


def silent(pool: ClientPool, names: Collection[str], exit_of: int | None = None) -> Altered:
    """Clients of some names never answer; with ``exit_of``, only where a head is fitted to the output of that layer."""

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        asked = exit_of is None or (isinstance(order, Fitting) and order.window.top == exit_of)
        return _LATE if client.name in names and asked else answer

    return Altered(pool, alter)


def rough(pool: ClientPool) -> Altered:
    """Updates add up to something else in another order: those of the clients 0 and 1 of a name cancel out, and between them
    anything that is not enormous is lost.
    """

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        place = int(client.name.rpartition("-")[2])
        if not isinstance(answer, Update) or place > 1:
            return answer
        return _with(answer, "head.linear.bias", lambda bias: torch.full_like(bias, (-1) ** place * 1e30))

    return Altered(pool, alter)


def spoilt(pool: ClientPool, names: Collection[str], shape: bool = False) -> Altered:
    """Some clients' updates hold a value that is no number, or with ``shape`` a tensor of the wrong one."""

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        if client.name not in names or not isinstance(answer, Update):
            return answer
        return _with(answer, "head.linear.bias", lambda bias: bias[:-1] if shape else torch.full_like(bias, torch.nan))

    return Altered(pool, alter)


def poisoned(pool: ClientPool, names: Collection[str]) -> Altered:
    """Some clients send the opposite of what they learned, a hundred times as strong."""

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        if client.name not in names or not isinstance(answer, Update):
            return answer
        assert isinstance(order, Training)
        start = order.tensors
        return replace(answer, tensors={name: 101 * start[name] - 100 * new for name, new in answer.tensors.items()})

    return Altered(pool, alter)


def lying(pool: ClientPool, name: str, lies: Mapping[str, float]) -> Altered:
    """A client multiplies tensors of its sums for a head by some factor; without ``lies`` it sends no sums at all."""

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        if client.name != name or not isinstance(answer, HeadSums):
            return answer
        if not lies:
            return Update({}, answer.examples, 0.0, 0, 0.0, 0.0)
        return replace(answer, tensors={key: new * lies.get(key, 1) for key, new in answer.tensors.items()})

    return Altered(pool, alter)


def dying(pool: ClientPool, turns: int, kind: type[TurnOrder] = Training) -> Altered:
    """The process ends once ``turns`` turns of a kind of order were taken."""
    left = turns

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        nonlocal left
        if isinstance(order, kind):
            if not left:
                raise Killed
            left -= 1
        return answer

    return Altered(pool, alter)


def failing(pool: ClientPool, reason: str) -> Altered:
    """Every turn fails."""
    return Altered(pool, lambda client, order, answer: Failure(reason))


def _with(update: Update, name: str, change: Callable[[Tensor], Tensor]) -> Update:
    return replace(update, tensors={**update.tensors, name: change(update.tensors[name])})
