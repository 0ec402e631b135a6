"""Pools in which something goes wrong. Each runs turns in another pool, and alters, drops or records the answers."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from chainfed_ray.client.messages import Client, Fitting, HeadSums, Training, TurnOrder, TurnResult, Update
from chainfed_ray.client.pool import ClientPool, Failure, Foresee, Outcome
from chainfed_ray.errors import BudgetExceeded

Answer = TurnResult | Failure
Alter = Callable[[Client, TurnOrder, Answer], Answer]

_LATE = Failure("missed the deadline")


class Altered:
    """A pool that passes each answer of another pool through ``alter``."""

    def __init__(self, pool: ClientPool, alter: Alter) -> None:
        self._pool, self._alter = pool, alter

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        for place, answer in self._pool.run(clients, order, deadline):
            yield Outcome(place, self._alter(clients[place], order, answer))

    def expect(self, foresee: Foresee) -> None:
        """See ``ClientPool``."""
        self._pool.expect(foresee)

    def close(self) -> None:
        """See ``ClientPool``."""
        self._pool.close()


class Backwards(Altered):
    """A pool that gives the answers of another pool in reverse order."""

    def __init__(self, pool: ClientPool) -> None:
        super().__init__(pool, lambda client, order, answer: answer)

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        return iter(list(super().run(clients, order, deadline))[::-1])


class Heard(Altered):
    """A pool that alters nothing. It records the names of the clients of each call, and every update with its order."""

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


class Foreseeing(Altered):
    """A pool that alters nothing. It records the classes of each call, and what it was told to expect before and after it."""

    def __init__(self, pool: ClientPool) -> None:
        super().__init__(pool, lambda client, order, answer: answer)
        self.calls: list[tuple[TurnOrder, Counter[str]]] = []
        self.expected: list[Counter[str]] = []

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        self.calls.append((order, Counter(client.client_class for client in clients)))
        yield from super().run(clients, order, deadline)

    def expect(self, foresee: Foresee) -> None:
        """See ``ClientPool``."""
        self.expected.append(Counter({need.client_class: need.clients for need in foresee()}))


class Greedy(Altered):
    """A pool in which the clients called ``greedy`` exceed every plan of more than ``enough`` bytes.

    If they are ``modest``, they do so only under a cap below all the memory that they declared.
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
    """Stands for the death of a process, within a living one. No code may catch it."""


class Nobody:
    """A pool in which no client answers."""

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        return iter([Outcome(place, _LATE) for place in range(len(clients))])

    def expect(self, foresee: Foresee) -> None:
        """See ``ClientPool``."""

    def close(self) -> None:
        """See ``ClientPool``."""


def silent(pool: ClientPool, names: Collection[str], exit_of: int | None = None) -> Altered:
    """A pool in which the clients called ``names`` never answer.

    With ``exit_of`` they do not answer only if a head is fitted to the output of that layer.
    """

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        asked = exit_of is None or (isinstance(order, Fitting) and order.window.top == exit_of)
        return _LATE if client.name in names and asked else answer

    return Altered(pool, alter)


def rough(pool: ClientPool) -> Altered:
    """A pool whose updates have another sum in float32 if they are added in another order.

    The updates of clients 0 and 1 are large and cancel out. What is added between them would lose most of its digits.
    """

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        place = int(client.name.rpartition("-")[2])
        if not isinstance(answer, Update) or place > 1:
            return answer
        return _with(answer, "head.linear.bias", lambda bias: torch.full_like(bias, (-1) ** place * 200.0))

    return Altered(pool, alter)


def spoilt(pool: ClientPool, names: Collection[str], shape: bool = False) -> Altered:
    """A pool in which the updates of the clients called ``names`` hold NaN or, with ``shape``, a tensor of a wrong shape."""

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        if client.name not in names or not isinstance(answer, Update):
            return answer
        return _with(answer, "head.linear.bias", lambda bias: bias[:-1] if shape else torch.full_like(bias, torch.nan))

    return Altered(pool, alter)


def poisoned(pool: ClientPool, names: Collection[str]) -> Altered:
    """A pool in which the clients called ``names`` send the opposite of their update, a hundred times as large."""

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        if client.name not in names or not isinstance(answer, Update):
            return answer
        assert isinstance(order, Training)
        start = order.tensors
        return replace(answer, tensors={name: 101 * start[name] - 100 * new for name, new in answer.tensors.items()})

    return Altered(pool, alter)


def lying(pool: ClientPool, name: str, lies: Mapping[str, float]) -> Altered:
    """A pool in which the client called ``name`` multiplies tensors of its sums for a head by the factors in ``lies``.

    Without ``lies`` the client sends an update in place of its sums.
    """

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        if client.name != name or not isinstance(answer, HeadSums):
            return answer
        if not lies:
            return Update({}, answer.examples, 0.0, 0, 0.0, 0.0)
        return replace(answer, tensors={key: new * lies.get(key, 1) for key, new in answer.tensors.items()})

    return Altered(pool, alter)


def dying(pool: ClientPool, turns: int, kind: type[TurnOrder] = Training) -> Altered:
    """A pool whose process dies after ``turns`` turns of a ``kind`` of order."""
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
    """A pool in which every turn fails with ``reason``."""
    return Altered(pool, lambda client, order, answer: Failure(reason))


def _with(update: Update, name: str, change: Callable[[Tensor], Tensor]) -> Update:
    return replace(update, tensors={**update.tensors, name: change(update.tensors[name])})
