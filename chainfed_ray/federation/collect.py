"""Collects the updates of one round into one aggregate, with a record of every turn.

Each sampled client takes a turn. A client that exceeds its plan takes a second turn, with its fallback plan.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter

from chainfed_ray.activity import SILENT, Reporter
from chainfed_ray.aggregation.aggregate import Aggregate
from chainfed_ray.aggregation.checks import check_claims, check_update
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client, TurnOrder, TurnResult, Update
from chainfed_ray.client.pool import ClientPool, Failure, as_they_come
from chainfed_ray.errors import InvalidUpdate, QuorumLost
from chainfed_ray.federation.cohort import Cohort, has_come
from chainfed_ray.hub import first_line
from chainfed_ray.model.adapters import Tensors, of_ranks
from chainfed_ray.planning.candidates import Candidate
from chainfed_ray.records.rounds import FailedTurn, Round, Turn, finite

_FRUITLESS_ROUNDS = 3  # without a quorum, in a row: then the job ends


class UpdateCollector:
    """Checks the updates of one round, adds each to ``aggregate`` as it arrives, and records every turn.

    ``trained`` gives the tensors that a client must send for its window. Each result comes with the ``place`` of its client
    among those that were sampled. The records are in the order of the places, whenever the results arrived.
    """

    def __init__(self, trained: Callable[[Window], Tensors], aggregate: Aggregate) -> None:
        self._trained, self._aggregate = trained, aggregate
        self._turns: dict[int, Turn] = {}
        self._failed_turns: dict[int, FailedTurn] = {}

    @property
    def turns(self) -> list[Turn]:
        """The successful turns, in the order of the clients."""
        return [self._turns[place] for place in sorted(self._turns)]

    @property
    def failed_turns(self) -> list[FailedTurn]:
        """The failed turns, in the order of the clients."""
        return [self._failed_turns[place] for place in sorted(self._failed_turns)]

    def add(self, place: int, client: Client, result: TurnResult | Failure, exceeded: str | None = None) -> None:
        """Add an update to the aggregate, or record a failed turn.

        If this was the client's second turn, ``exceeded`` is the reason why its first one failed.
        """
        if isinstance(result, Failure):
            self._failed_turns[place] = failed_turn(client, result, exceeded)
            return
        try:
            with readable(client):
                update = self._checked(client, result)
                turn = _as_turn(client, update, exceeded)
        except InvalidUpdate as error:
            refused = Failure(f"its update was refused: {error.reason}")
            self._failed_turns[place] = failed_turn(client, refused, exceeded)
            return
        # The count of the plan is used, not a claim of this answer: it could inflate the weight.
        self._aggregate.add(place, update.tensors, client.counts.examples)
        self._turns[place] = turn

    def add_absent(self, place: int, candidate: Candidate, absence: Failure) -> None:
        """Record that a client which was sampled took no turn."""
        awaited = not has_come(candidate)
        self._failed_turns[place] = failed_turn(candidate, absence).model_copy(update={"awaited": awaited})

    def aggregate(self) -> Tensors:
        """The aggregate of the updates so far. Each tensor is aggregated over the clients that sent it."""
        return self._aggregate.result()

    @property
    def fraction_bits(self) -> int | None:
        """The bits behind the point of what was summed; None if the rule sums nothing."""
        return self._aggregate.fraction_bits

    def loss(self) -> float | None:
        """The mean training loss over the examples of all updates, in nats; None without updates."""
        turns = self.turns
        examples = sum(turn.examples for turn in turns)
        return finite(sum(turn.loss * turn.examples for turn in turns) / examples) if turns else None

    def _checked(self, client: Client, result: TurnResult) -> Update:
        if not isinstance(result, Update):
            raise InvalidUpdate(client.name, f"it is a {type(result).__name__}")
        expected = of_ranks(self._trained(client.plan.window), slice(client.plan.rank))
        check_update(client.name, result.tensors, expected, client.counts.examples)
        if impossible := self._aggregate.impossible(result.tensors):
            raise InvalidUpdate(client.name, impossible)
        # An objective of the caller's own may be negative.
        if not isinstance(result.loss, float) or not math.isfinite(result.loss):
            raise InvalidUpdate(client.name, f"its loss is {reprlib.repr(result.loss)}")
        check_claims(
            client.name,
            result.peak_bytes,
            steps=result.steps,
            seconds=result.seconds,
            cpu_seconds=result.cpu_seconds,
        )
        return result


def collect_updates(
    pool: ClientPool,
    cohort: Cohort,
    order: TurnOrder,
    deadline: float,
    prepared: Callable[[Sequence[Client]], list[Client]],
    collector: UpdateCollector,
    reporter: Reporter = SILENT,
) -> None:
    """Hand ``order`` to the clients of ``cohort``, and add each result to ``collector`` as it arrives. None is held here.

    ``prepared`` changes the clients before each turn: it gives them their share of the noise in a job with privacy.
    ``deadline`` (seconds) covers the first and the second turns together.
    """
    started = perf_counter()
    places = {candidate.name: place for place, candidate in enumerate(cohort.sampled)}
    clients = prepared(cohort.clients)
    for candidate, absence in cohort.absent:
        collector.add_absent(places[candidate.name], candidate, absence)
    exceeded: dict[str, Failure] = {}
    outcomes = reporter.each(pool.run(clients, order, deadline), len(clients), "clients")
    for place, result in as_they_come(outcomes, len(clients)):
        client = clients[place]
        if isinstance(result, Failure) and result.exceeded and client.name not in cohort.on_fallback:
            exceeded[client.name] = result
        else:
            collector.add(places[client.name], client, result)

    # The first plan may have been too small. So a client is excluded only if its second turn, with the fallback plan or its
    # whole budget, fails as well.
    able = prepared(cohort.second_turns(exceeded))
    left = max(deadline - (perf_counter() - started), 0.0)
    outcomes = reporter.each(pool.run(able, order, left) if able else (), len(able), "clients")
    for place, result in as_they_come(outcomes, len(able)):
        client = able[place]
        collector.add(places[client.name], client, result, exceeded.pop(client.name).reason)
    for client in clients:
        if failure := exceeded.get(client.name):
            without = replace(failure, reason=f"{failure.reason}; there is no fallback plan")
            collector.add(places[client.name], client, without)


@contextmanager
def readable(client: Client) -> Iterator[None]:
    """Read a client's answer in the block. Whatever goes wrong there is wrong with the answer, and costs its turn.

    Raises:
        InvalidUpdate: the answer is refused, or is nothing that an honest client sends.
    """
    try:
        yield
    except InvalidUpdate:
        raise
    except Exception as error:
        raise InvalidUpdate(client.name, f"it cannot be read ({type(error).__name__}: {first_line(error)})") from None


def failed_turn(client: Client | Candidate, failure: Failure, exceeded: str | None = None) -> FailedTurn:
    """The record of a failed turn. If it was a second turn, ``exceeded`` is the reason why the first one failed."""
    return FailedTurn(
        client=client.name,
        client_class=client.client_class,
        reason=failure.reason,
        over_budget=failure.exceeded,
        exceeded=exceeded,
    )


def reasons(failed_turns: Iterable[FailedTurn]) -> dict[str, str]:
    """The reason of each failed turn, by client."""
    return {turn.client: turn.reason for turn in failed_turns}


def check_fruitful(history: Sequence[Round], quorum: int) -> None:
    """Check that the newest rounds were not without a quorum, several in a row. Nobody was lost who has not come yet.

    Raises:
        QuorumLost: they were; with the reasons.
    """
    newest = history[-_FRUITLESS_ROUNDS:]
    found = [len(record.turns) + sum(turn.awaited for turn in record.failed_turns) for record in newest]
    if len(newest) == _FRUITLESS_ROUNDS and max(found) < quorum:
        rounds = f"rounds {newest[0].index + 1} to {newest[-1].index + 1}"
        raise QuorumLost(rounds, quorum, reasons(newest[-1].failed_turns))


def _as_turn(client: Client, update: Update, exceeded: str | None) -> Turn:
    plan = client.plan
    return Turn(
        client=client.name,
        client_class=client.client_class,
        examples=client.counts.examples,
        loss=update.loss,
        steps=update.steps,
        seconds=update.seconds,
        cpu_seconds=update.cpu_seconds,
        bottom=plan.window.bottom,
        micro_batch=plan.micro_batch,
        weights=plan.weights,
        activations_offloaded=plan.activations == "offloaded",
        activations_recomputed=plan.activations == "recomputed",
        rank=plan.rank,
        budget_bytes=client.budget_bytes,
        planned_bytes=plan.planned_bytes,
        peak_bytes=update.peak_bytes,
        sent_bytes=sum(tensor.nbytes for tensor in update.tensors.values()),
        exceeded=exceeded,
    )
