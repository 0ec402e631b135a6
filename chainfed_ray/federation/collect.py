"""A round among the clients: their updates, collected into one aggregate, and a record of every turn.

Those sampled have their turns, and those that exceeded their plan have one more, with a smaller plan.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from time import perf_counter

from chainfed_ray.activity import SILENT, Reporter
from chainfed_ray.aggregation.mean import Aggregate, check_update
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client, TurnOrder, TurnResult, Update
from chainfed_ray.client.pool import ClientPool, Failure, in_order
from chainfed_ray.errors import InvalidUpdate
from chainfed_ray.federation.cohort import Cohort
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.records.rounds import FailedTurn, Turn


class UpdateCollector:
    """The turns of one round; ``trained`` gives the tensors that a client is to send for its window.

    Updates are folded into ``aggregate`` as they are added: in the order of the clients, not of their arrival.
    """

    def __init__(self, trained: Callable[[Window], Tensors], aggregate: Aggregate) -> None:
        self._trained, self._aggregate = trained, aggregate
        self.turns: list[Turn] = []
        self.failed_turns: list[FailedTurn] = []

    def add(self, client: Client, result: TurnResult | Failure, exceeded: str | None = None) -> None:
        """Fold an update, or say why a turn does not count; ``exceeded`` is how the client's first plan failed."""
        if isinstance(result, Failure):
            self.failed_turns.append(failed_turn(client, result, exceeded))
            return
        try:
            update = self._checked(client, result)
        except InvalidUpdate as error:
            self.failed_turns.append(failed_turn(client, Failure(f"its update was refused: {error.reason}"), exceeded))
            return
        # The weight is what the server dealt, not what a client says.
        self._aggregate.add(update.tensors, len(client.examples))
        self.turns.append(_as_turn(client, update, exceeded))

    def aggregate(self) -> Tensors:
        """What the updates come to, each tensor over those that sent it."""
        return self._aggregate.result()

    def loss(self) -> float | None:
        """The mean training loss of an example; None without any update."""
        examples = sum(turn.examples for turn in self.turns)
        return sum(turn.loss * turn.examples for turn in self.turns) / examples if self.turns else None

    def _checked(self, client: Client, result: TurnResult) -> Update:
        if not isinstance(result, Update):
            raise InvalidUpdate(client.name, f"it is a {type(result).__name__}")
        check_update(client.name, result.tensors, self._trained(client.plan.window), len(client.examples))
        if not math.isfinite(result.loss):
            raise InvalidUpdate(client.name, f"its loss is {result.loss}")
        return result


def collect_updates(
    pool: ClientPool,
    cohort: Cohort,
    order: TurnOrder,
    deadline: float,
    prepared: Callable[[Sequence[Client]], list[Client]],
    fold: UpdateCollector,
    reporter: Reporter = SILENT,
) -> None:
    """Hand ``order`` to the clients of ``cohort``, and fold what comes of it in client order.

    Clients are ``prepared`` for each turn; ``deadline`` (seconds) is that of both turns together.
    """
    started = perf_counter()
    clients = prepared(cohort.clients)
    outcomes = reporter.each(pool.run(clients, order, deadline), len(clients), "clients")
    for client, silence in cohort.absent:
        fold.add(client, silence)
    exceeded: dict[str, Failure] = {}
    for outcome in in_order(outcomes, len(clients)):
        client, result = clients[outcome.place], outcome.result
        if isinstance(result, Failure) and result.exceeded and client.name not in cohort.lean:
            exceeded[client.name] = result
        else:
            fold.add(client, result)

    # A client is left out only after a turn with a leaner plan, or its whole budget: the first plan may have been wrong.
    able = prepared(cohort.second_turns(exceeded))
    left = max(deadline - (perf_counter() - started), 0.0)
    outcomes = reporter.each(pool.run(able, order, left) if able else (), len(able), "clients")
    for outcome in in_order(outcomes, len(able)):
        first = exceeded.pop(able[outcome.place].name).reason
        fold.add(able[outcome.place], outcome.result, first)
    for client in clients:
        if failure := exceeded.get(client.name):
            fold.add(client, replace(failure, reason=f"{failure.reason}; there is no leaner plan"))


def failed_turn(client: Client, failure: Failure, exceeded: str | None = None) -> FailedTurn:
    """The record of a turn that does not count."""
    return FailedTurn(
        client=client.name,
        client_class=client.client_class,
        reason=failure.reason,
        over_budget=failure.exceeded,
        exceeded=exceeded,
    )


def reasons(lost: Iterable[FailedTurn]) -> dict[str, str]:
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
        weights=plan.weights,
        activations_offloaded=plan.activations_offloaded,
        budget_bytes=client.budget_bytes,
        planned_bytes=plan.planned_bytes,
        peak_bytes=update.peak_bytes,
        sent_bytes=sum(tensor.nbytes for tensor in update.tensors.values()),
        exceeded=exceeded,
    )
