"""The head in closed form: every client's sums, and the classifier that they give (discriminant.py)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy, layer_norm, linear, pad

from chainfed_ray.activity import SILENT, Reporter
from chainfed_ray.aggregation.discriminant import ClassSums, fitted
from chainfed_ray.aggregation.mean import check_update
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client, Fitting, HeadSums, TurnResult
from chainfed_ray.client.pool import ClientPool, Failure, in_order
from chainfed_ray.data.tokens import Examples
from chainfed_ray.device.threads import one_thread
from chainfed_ray.errors import InvalidUpdate
from chainfed_ray.evaluation.early_exit import pooled_features
from chainfed_ray.evaluation.score import Score
from chainfed_ray.federation.collect import failed_turn
from chainfed_ray.federation.prepare import PlannedJob
from chainfed_ray.model.adapters import AdapterStack, Tensors
from chainfed_ray.model.source import ModelSource
from chainfed_ray.records.rounds import FailedTurn, HeadFit


class FittedHead(NamedTuple):
    """The head's tensors by their names in the stack; empty if nobody sent sums, or no classifier follows from them."""

    tensors: Tensors
    record: HeadFit


def fit_head(
    job: PlannedJob, pool: ClientPool, clients: Sequence[Client], order: Fitting, reporter: Reporter = SILENT
) -> FittedHead:
    """Ask ``clients`` for their sums, add them up in client order, and settle the rest on the job's validation rows."""
    deadline = deadline_of_all(job, len(clients))
    stack = AdapterStack.from_tensors(order.tensors)
    assert stack.head is not None, "a language model keeps its own head"
    shape = stack.head.linear.out_features, stack.head.features(order.window.top)
    total = ClassSums.zeros(*shape, torch.float64)
    with torch.device("meta"):  # their shapes, without their bytes
        expected = ClassSums.zeros(*shape).tensors()
    cpu_seconds: list[float] = []  # of each client whose sums count; the sums themselves are not kept
    lost: list[FailedTurn] = []
    outcomes = reporter.each(pool.run(clients, order, deadline), len(clients), "clients")
    for place, result in in_order(outcomes, len(clients)):
        client = clients[place]
        try:
            found = _checked(client, result, expected)
        except InvalidUpdate as error:
            lost.append(failed_turn(client, Failure(error.reason)))
        else:
            if isinstance(found, Failure):
                # A client that exceeds its plan here is not left out: in a round it may have a second turn.
                lost.append(failed_turn(client, replace(found, exceeded=False)))
            else:
                sums, seconds = found
                total.add(sums)
                cpu_seconds.append(seconds)
    head, score = _head(total, stack, order.window, job.validation, job.base, reporter) if cpu_seconds else ({}, None)
    record = HeadFit(
        clients=len(cpu_seconds),
        examples=int(total.counts.sum()),
        cpu_seconds=sum(cpu_seconds),
        sent_bytes=len(cpu_seconds) * sum(tensor.nbytes for tensor in expected.values()),
        failed_turns=tuple(lost),
        held_out_loss=score.loss if score else None,
        accuracy=score.accuracy if score else None,
    )
    return FittedHead(head, record)


def deadline_of_all(job: PlannedJob, clients: int) -> float:
    """The deadline (seconds) where all the job's ``clients`` are asked: ``rounds.deadline`` is for those of a round."""
    return job.spec.rounds.deadline * math.ceil(clients / job.spec.rounds.clients)


def _head(
    total: ClassSums, stack: AdapterStack, window: Window, held_out: Examples, base: ModelSource, reporter: Reporter
) -> tuple[Tensors, Score | None]:
    """The head's tensors, and its score on ``held_out`` examples; none if no classifier follows from the sums."""
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
    # Below the first layer there is nothing to read.
    unread = stack.head_layers * hidden - weight.shape[1]
    head = {
        "head.norm.weight": torch.ones(hidden),
        "head.norm.bias": torch.zeros(hidden),
        "head.linear.weight": pad(weight, (unread, 0)),
        "head.linear.bias": bias,
    }
    return head, score


def _checked(client: Client, result: TurnResult | Failure, expected: Tensors) -> tuple[ClassSums, float] | Failure:
    """The sums, and the seconds of CPU that they took."""
    if isinstance(result, Failure):
        return result
    if not isinstance(result, HeadSums):
        raise InvalidUpdate(client.name, f"it is a {type(result).__name__}")
    check_update(client.name, result.tensors, expected, len(client.examples))
    sums = ClassSums.of(result.tensors)
    if impossible := sums.impossible(len(client.examples)):
        raise InvalidUpdate(client.name, impossible)
    return sums, result.cpu_seconds
