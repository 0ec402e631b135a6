"""Counts what the clients of a run spend, turn by turn: steps, CPU seconds and bytes."""

from collections.abc import Iterator, Sequence
from time import perf_counter

from benchmarks.accuracy_protocols import Point, Spent
from chainfed_ray.client.messages import Client, HeadLosses, Metrics, Profile, Training, TurnOrder, TurnResult, Update
from chainfed_ray.client.pool import ClientPool, Failure, Foresee, Outcome


class TurnFailed(RuntimeError):
    """A client's turn failed. The run has no figures then: with a turn less it would be another run."""


class Meter:
    """The cost of every turn so far. ``seconds`` is their total wall time, one after the other."""

    def __init__(self) -> None:
        self.turns: list[Spent] = []
        self.seconds = 0.0

    def point(self, accuracy: float) -> Point:
        """A point of the learning curve: what has been spent so far, and the present accuracy on the validation rows."""
        return self.steps, self.cpu_seconds, self.sent_bytes, self.seconds, accuracy

    @property
    def steps(self) -> int:
        """The optimizer steps of all turns."""
        return sum(turn.steps for turn in self.turns)

    @property
    def cpu_seconds(self) -> float:
        """The CPU seconds of all turns."""
        return sum(turn.cpu_seconds for turn in self.turns)

    @property
    def sent_bytes(self) -> int:
        """The bytes that clients sent to the server in all turns."""
        return sum(turn.sent_bytes for turn in self.turns)


class MeteredPool:
    """A pool that runs turns in another pool, and counts the cost of each with ``meter``."""

    def __init__(self, pool: ClientPool, meter: Meter) -> None:
        self._pool, self._meter = pool, meter
        self.narrowest_window: int | None = None

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """Run the turns in the other pool, and count them.

        Raises:
            TurnFailed: one of the turns failed.
        """
        outcomes = self._pool.run(clients, order, deadline)
        while True:
            started = perf_counter()
            outcome = next(outcomes, None)
            self._meter.seconds += perf_counter() - started
            if outcome is None:
                return
            client = clients[outcome.place]
            if isinstance(outcome.result, Failure):
                raise TurnFailed(f"the turn of {client.name} failed: {outcome.result.reason}")
            self._meter.turns.append(_spent(client, order, outcome.result))
            if isinstance(order, Training):
                width = len(client.plan.window)
                self.narrowest_window = min(width, self.narrowest_window or width)
            yield outcome

    def expect(self, foresee: Foresee) -> None:
        """See ``ClientPool``."""
        self._pool.expect(foresee)

    def close(self) -> None:
        """Close the other pool."""
        self._pool.close()


def _spent(client: Client, order: TurnOrder, result: TurnResult) -> Spent:
    match result:
        case Profile(cka=cka):
            sent = 8 * len(cka)
        case Metrics() | HeadLosses():
            sent = 0
        case _:
            sent = sum(tensor.nbytes for tensor in result.tensors.values())
    stage = order.window.bottom if isinstance(order, Training) else None
    steps = result.steps if isinstance(result, Update) else 0
    return Spent(client.name, stage, steps, result.cpu_seconds, sent)
