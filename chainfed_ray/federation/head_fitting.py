"""Fits a stage's head in closed form: collects every client's sums and computes the classifier (``discriminant.py``)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm, linear, pad

from chainfed_ray.activity import SILENT, Reporter
from chainfed_ray.aggregation.checks import check_claims, check_update
from chainfed_ray.aggregation.discriminant import candidates, fitted
from chainfed_ray.aggregation.fixed_point import FixedPoint, FixedPointSums
from chainfed_ray.chain import Window
from chainfed_ray.client.head_sums import TEMPERATURES, ClassSums, largest
from chainfed_ray.client.messages import CANDIDATE, Calibrating, Client, Fitting, HeadLosses, HeadSums, TurnResult
from chainfed_ray.client.pool import ClientPool, Failure, Outcome, as_they_come, in_order
from chainfed_ray.data.examples import most_held_out
from chainfed_ray.data.tokens import Examples
from chainfed_ray.device.threads import one_thread
from chainfed_ray.errors import InvalidUpdate
from chainfed_ray.evaluation.early_exit import pooled_features
from chainfed_ray.evaluation.score import Score
from chainfed_ray.federation.collect import failed_turn, readable
from chainfed_ray.model.adapters import AdapterStack, Tensors
from chainfed_ray.model.source import ModelSource
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.rounds import FailedTurn, HeadFit

_MOST_LOSS = 2.0**50  # in nats: sums of such losses are finite


class FittedHead(NamedTuple):
    """The head's tensors by their names in the stack, and the record of the fit.

    ``tensors`` is empty if no client sent sums, or if no classifier follows from them.
    """

    tensors: Tensors
    record: HeadFit


def fit_head(
    job: PlannedJob, pool: ClientPool, clients: Sequence[Client], order: Fitting, reporter: Reporter = SILENT
) -> FittedHead:
    """Ask ``clients`` for their sums, and fit the head to them.

    The classifier is calibrated, and scored, on the job's validation rows. A client whose turn fails, or whose sums are
    impossible, is on record among the failed turns, and the others go on.
    """
    stack = AdapterStack.from_tensors(order.tensors)
    assert stack.head is not None, "a language model keeps its own head"
    shape = stack.head.linear.out_features, stack.head.features(order.exit)
    with torch.device("meta"):  # only shapes and dtypes are needed, so no memory is allocated
        expected = ClassSums.zeros(*shape).tensors()
    outcomes = reporter.each(pool.run(clients, order, deadline_of_all(job, len(clients))), len(clients), "clients")
    sums = _collected(outcomes, clients, expected, largest(shape[1]))
    window = Window(order.window.bottom, order.exit)
    if sums.total is None:
        head, score = dict[str, Tensor](), None
    elif job.spec.evaluation.rows == "sites":
        head, score = _head_by_sites(job, pool, clients, sums.total, order.tensors, window)
    else:
        head, score = _head_by_server(sums.total, stack, window, job.validation, job.base, reporter)
    record = HeadFit(
        clients=len(sums.cpu_seconds),
        examples=int(sums.total.counts.sum()) if sums.total else 0,
        cpu_seconds=sum(sums.cpu_seconds),
        sent_bytes=len(sums.cpu_seconds) * sum(tensor.nbytes for tensor in expected.values()),
        failed_turns=sums.failed_turns,
        held_out_loss=score.loss if score else None,
        accuracy=score.accuracy if score else None,
    )
    return FittedHead(head, record)


class _CollectedSums(NamedTuple):
    """The ``total`` of the clients' sums; None if none came. CPU seconds of the clients that sent some; failed turns."""

    total: ClassSums | None
    cpu_seconds: tuple[float, ...]
    failed_turns: tuple[FailedTurn, ...]


def _collected(
    outcomes: Iterable[Outcome], clients: Sequence[Client], expected: Tensors, most: float
) -> _CollectedSums:
    """Add up the clients' sums as they come. Each has the names, shapes and dtypes of ``expected``.

    ``most`` bounds what one example adds to an entry.

    They are added as integers (``fixed_point.py``), so the order of arrival changes no bit, and none waits here for another.
    """
    sums = FixedPointSums(FixedPoint(most, max(sum(client.counts.examples for client in clients), 1)))
    spent: dict[int, float] = {}  # the CPU seconds of each client whose sums were added
    failed: dict[int, FailedTurn] = {}
    for place, result in as_they_come(outcomes, len(clients)):
        client = clients[place]
        try:
            with readable(client):
                found = _checked(client, result, expected)
        except InvalidUpdate as error:
            failed[place] = failed_turn(client, Failure(error.reason))
        else:
            if isinstance(found, Failure):
                # A client that exceeds its plan here is not excluded: it has had no second turn yet, as it would in a round.
                failed[place] = failed_turn(client, replace(found, exceeded=False))
            else:
                for name, tensor in found.tensors.items():
                    sums.add_sum(name, tensor.to(torch.float64, copy=True), client.counts.examples)
                spent[place] = found.cpu_seconds
    return _CollectedSums(
        ClassSums.of({name: sums.total(name) for name in expected}) if spent else None,
        tuple(spent[place] for place in sorted(spent)),
        tuple(failed[place] for place in sorted(failed)),
    )


def deadline_of_all(job: PlannedJob, clients: int) -> float:
    """The deadline (seconds) for an order that all the job's ``clients`` carry out.

    ``rounds.deadline`` is for the clients of one round. It is multiplied by the rounds that it takes to reach every client.
    """
    return job.spec.rounds.deadline * math.ceil(clients / job.spec.rounds.clients)


def _head_by_server(
    total: ClassSums, stack: AdapterStack, window: Window, held_out: Examples, base: ModelSource, reporter: Reporter
) -> tuple[Tensors, Score | None]:
    """The head's tensors, and its score on the ``held_out`` examples; empty and None if the sums give no classifier."""
    with one_thread():
        means, labels = pooled_features(held_out, base, base.scratch / "(validation)", stack, window, reporter)
        hidden = means.shape[-1]
        features = layer_norm(means, (hidden,)).flatten(1)
        found = fitted(total, features, labels)
        if found is None:
            return {}, None
        weight, bias = found
        logits = linear(features, weight, bias)
        score = Score(float(cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean()))
    return _head_tensors(weight, bias, stack, hidden), score


def _head_tensors(weight: Tensor, bias: Tensor, stack: AdapterStack, hidden: int) -> Tensors:
    # Near the bottom of the model fewer layers lie below the window's top than the head has room for: those weights stay 0.
    unused = stack.head_layers * hidden - weight.shape[1]
    return {
        "head.norm.weight": torch.ones(hidden),
        "head.norm.bias": torch.zeros(hidden),
        "head.linear.weight": pad(weight, (unused, 0)),
        "head.linear.bias": bias,
    }


def _head_by_sites(
    job: PlannedJob, pool: ClientPool, clients: Sequence[Client], total: ClassSums, tensors: Tensors, window: Window
) -> tuple[Tensors, Score | None]:
    """The head's tensors, and its score on the rows that sites hold out. They send the loss of each candidate.

    The candidates are those of ``fitted``; their temperatures are those of a grid, so that losses of sites can be added up.
    """
    found = candidates(total)
    sent = {f"{CANDIDATE}{place}.weight": weight for place, (weight, _) in enumerate(found)}
    sent |= {f"{CANDIDATE}{place}.bias": bias for place, (_, bias) in enumerate(found)}
    losses, correct = torch.zeros(len(found), len(TEMPERATURES), dtype=torch.float64), torch.zeros(len(found))
    examples = 0
    order = Calibrating({**tensors, **sent}, window)
    outcomes = pool.run(clients, order, deadline_of_all(job, len(clients))) if found else ()
    for place, result in in_order(outcomes, len(clients) if found else 0):
        most = most_held_out(job.spec.model, job.spec.data, clients[place].counts)
        if isinstance(result, HeadLosses) and is_possible(result, len(found), most):
            losses += torch.tensor(result.losses, dtype=torch.float64)
            correct += torch.tensor(result.correct)
            examples += result.examples
    if not examples or not losses.isfinite().all():
        return {}, None
    place, heat = divmod(int(losses.argmin()), len(TEMPERATURES))
    weight, bias = (tensor / TEMPERATURES[heat] for tensor in found[place])
    score = Score(float(losses[place, heat]) / examples, float(correct[place]) / examples)
    return _head_tensors(weight, bias, AdapterStack.from_tensors(tensors), job.hidden), score


def is_possible(result: HeadLosses, count: int, most: int) -> bool:
    """True if ``count`` classifiers can have these losses on at most so many examples, ``most``.

    What a client says is checked, whatever its types.
    """
    if type(result.examples) is not int or not 0 <= result.examples <= most:
        return False
    if not isinstance(result.losses, tuple) or not isinstance(result.correct, tuple):
        return False
    if len(result.losses) != count or len(result.correct) != count:
        return False
    if not all(type(right) is int and 0 <= right <= result.examples for right in result.correct):
        return False
    rows = (row if isinstance(row, list | tuple) else () for row in result.losses)
    return all(
        len(row) == len(TEMPERATURES) and all(isinstance(loss, float) and 0 <= loss < _MOST_LOSS for loss in row)
        for row in rows
    )


def _checked(client: Client, result: TurnResult | Failure, expected: Tensors) -> HeadSums | Failure:
    """The client's sums; or the failure of its turn.

    Raises:
        InvalidUpdate: the result is no sums, has other names, shapes or dtypes, or no examples could have given it.
    """
    if isinstance(result, Failure):
        return result
    if not isinstance(result, HeadSums):
        raise InvalidUpdate(client.name, f"it is a {type(result).__name__}")
    check_update(client.name, result.tensors, expected, client.counts.examples)
    check_claims(client.name, result.peak_bytes, cpu_seconds=result.cpu_seconds)
    if impossible := ClassSums.of(result.tensors).impossible(client.counts.examples):
        raise InvalidUpdate(client.name, impossible)
    return result
