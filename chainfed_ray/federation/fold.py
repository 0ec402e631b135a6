"""What comes back in a round: updates that may be aggregated, folded into one, and a record of every turn."""

import math
from collections.abc import Callable, Iterable

from chainfed_ray.aggregation.mean import Aggregate, check_update
from chainfed_ray.chain import Window
from chainfed_ray.client.training import Client, Result, Update
from chainfed_ray.errors import InvalidUpdate
from chainfed_ray.federation.pool import Failure
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.records.rounds import Lost, Turn


class Fold:
    """The turns of one round; ``trained`` gives the tensors that a client is to send for its window.

    Updates are folded into ``aggregate`` as they are added: in the order of the clients, not of their arrival.
    """

    def __init__(self, trained: Callable[[Window], Tensors], aggregate: Aggregate) -> None:
        self._trained, self._aggregate = trained, aggregate
        self.turns: list[Turn] = []
        self.lost: list[Lost] = []

    def add(self, client: Client, result: Result | Failure, exceeded: str | None = None) -> None:
        """Fold an update, or say why a turn does not count; ``exceeded`` is how the client's first plan failed."""
        if isinstance(result, Failure):
            self.lost.append(as_lost(client, result, exceeded))
            return
        try:
            update = self._checked(client, result)
        except InvalidUpdate as error:
            self.lost.append(as_lost(client, Failure(f"its update was refused: {error.reason}"), exceeded))
            return
        # The weight is what the server dealt, not what a client says.
        self._aggregate.fold(update.tensors, len(client.examples))
        self.turns.append(_as_turn(client, update, exceeded))

    def aggregate(self) -> Tensors:
        """What the updates come to, each tensor over those that sent it."""
        return self._aggregate.result()

    def loss(self) -> float | None:
        """The mean training loss of an example; None without any update."""
        examples = sum(turn.examples for turn in self.turns)
        return sum(turn.loss * turn.examples for turn in self.turns) / examples if self.turns else None

    def _checked(self, client: Client, result: Result) -> Update:
        if not isinstance(result, Update):
            raise InvalidUpdate(client.name, f"it is a {type(result).__name__}")
        check_update(client.name, result.tensors, self._trained(client.plan.window), len(client.examples))
        if not math.isfinite(result.loss):
            raise InvalidUpdate(client.name, f"its loss is {result.loss}")
        return result


def as_lost(client: Client, failure: Failure, exceeded: str | None = None) -> Lost:
    """The record of a turn that does not count."""
    return Lost(
        client=client.name,
        client_class=client.client_class,
        reason=failure.reason,
        over_budget=failure.exceeded,
        exceeded=exceeded,
    )


def reasons(lost: Iterable[Lost]) -> dict[str, str]:
    """Why each client's turn does not count."""
    return {turn.client: turn.reason for turn in lost}


def _as_turn(client: Client, update: Update, exceeded: str | None) -> Turn:
    plan = client.plan
    return Turn(
        client=client.name,
        client_class=client.client_class,
        examples=len(client.examples),
        loss=update.loss,
        steps=update.steps,
        seconds=update.seconds,
        cpu_seconds=update.cpu_seconds,
        bottom=plan.window.bottom,
        micro_batch=plan.micro_batch,
        grain=plan.grain,
        spilled=plan.spilled,
        budget_bytes=client.budget_bytes,
        planned_bytes=plan.planned_bytes,
        peak_bytes=update.peak_bytes,
        sent_bytes=sum(tensor.nbytes for tensor in update.tensors.values()),
        exceeded=exceeded,
    )
