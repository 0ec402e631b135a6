"""A round among the clients: those sampled have their turns, and those that exceeded their plan have one more, leaner."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

from chainfed_ray.activity import SILENT, Reporter
from chainfed_ray.client.training import Client, Order
from chainfed_ray.federation.cohort import Cohort
from chainfed_ray.federation.fold import Fold
from chainfed_ray.federation.pool import ClientPool, Failure, in_order


def gather(
    pool: ClientPool,
    cohort: Cohort,
    order: Order,
    deadline: float,
    prepared: Callable[[Sequence[Client]], list[Client]],
    fold: Fold,
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
