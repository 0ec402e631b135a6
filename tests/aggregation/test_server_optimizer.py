"""The server's optimizer against a computation by hand, over three rounds in which the window slides."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from chainfed_ray.aggregation.server_optimizer import ServerOptimizer
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.spec.sections import AggregationSpec

_ROUNDS = ({"low", "head"}, {"low", "head"}, {"high", "head"})  # what each of them trains


def aggregates(before: Tensors) -> list[Tensors]:
    """What the clients of each round come to: nothing that follows from the stack, so that it is the same for everyone."""
    generator = torch.Generator().manual_seed(0)
    return [
        {name: 0.1 * torch.randn(before[name].shape, generator=generator) for name in sorted(names)}
        for names in _ROUNDS
    ]


@pytest.fixture
def start() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator) for name, shape in (("low", (3, 2)), ("high", 4), ("head", 2))
    }


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
@pytest.mark.parametrize("rate", [None, 0.3])
def test_three_rounds_by_hand(
    start: Tensors, optimizer: Literal["momentum", "adam", "yogi"], rate: float | None
) -> None:
    spec = AggregationSpec(optimizer=optimizer, server_learning_rate=rate, beta1=0.8, beta2=0.95, tau=0.02)
    server, stack = ServerOptimizer(spec), start
    x = {name: tensor.double().numpy() for name, tensor in start.items()}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    v = {name: np.full_like(value, 0.02**2) for name, value in x.items()}
    eta = rate or {"momentum": 1.0, "adam": 0.01, "yogi": 0.01}[optimizer]
    for aggregate in aggregates(start):
        before = stack
        stack, server = server.step(stack, aggregate)
        for name, mean in aggregate.items():
            delta = mean.double().numpy() - x[name]
            if optimizer == "momentum":
                m[name] = 0.8 * m[name] + delta
                x[name] = x[name] + eta * m[name]
                continue
            m[name] = 0.8 * m[name] + (1 - 0.8) * delta
            if optimizer == "adam":
                v[name] = 0.95 * v[name] + (1 - 0.95) * delta**2
            else:
                v[name] = v[name] - (1 - 0.95) * delta**2 * np.sign(v[name] - delta**2)
            x[name] = x[name] + eta * m[name] / (np.sqrt(v[name]) + 0.02)
        for name, tensor in stack.items():
            np.testing.assert_allclose(tensor.numpy(), x[name], rtol=1e-4, atol=1e-6)
            assert (name in aggregate) or torch.equal(tensor, before[name]), "not trained, not moved"
    kinds = "m" if optimizer == "momentum" else "mv"
    assert server.tensors.keys() == {f"{kind}.{name}" for kind in kinds for name in start}


def test_without_an_optimizer_the_aggregate_is_the_stack(start: Tensors) -> None:
    server = ServerOptimizer(AggregationSpec())
    aggregate = aggregates(start)[0]
    after, server = server.step(start, aggregate)
    assert after.keys() == start.keys()
    assert all(torch.equal(tensor, (start | aggregate)[name]) for name, tensor in after.items())
    assert not server.tensors


@pytest.mark.parametrize("optimizer", ["none", "momentum", "adam", "yogi"])
def test_what_a_rule_gives_is_committed_however_it_lies_in_memory(optimizer: Any) -> None:
    """Krum, or a rule of the caller's own, gives a client's tensors: transposed, or one of them twice."""
    start = {name: torch.zeros(3, 3) for name in ("low", "high", "head")}
    sent = torch.randn(3, 3)
    after, server = ServerOptimizer(AggregationSpec(optimizer=optimizer)).step(
        start, {"low": sent.T, "high": sent, "head": sent}
    )
    assert load(save(after | server.tensors)).keys() == {*start, *server.tensors}
    if optimizer == "none":
        sent.zero_()
        assert after["high"].any(), "what a client sent may change, or be gone"


def test_momentum_of_nothing_is_fedavg(start: Tensors) -> None:
    """β₁ = 0 and η = 1: the same step, but for a rounding of what is added to the stack."""
    server = ServerOptimizer(AggregationSpec(optimizer="momentum", beta1=0.0))
    aggregate = aggregates(start)[0]
    after, _ = server.step(start, aggregate)
    for name, tensor in (start | aggregate).items():
        torch.testing.assert_close(after[name], tensor)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
def test_the_state_is_all_there_is_to_remember(start: Tensors, optimizer: Literal["momentum", "adam", "yogi"]) -> None:
    spec = AggregationSpec(optimizer=optimizer)
    server, stack = ServerOptimizer(spec), start
    other, again = ServerOptimizer(spec), start
    for aggregate in aggregates(start):
        state = {name: tensor.clone() for name, tensor in other.tensors.items()}
        other = ServerOptimizer(spec, state)
        stack, server = server.step(stack, aggregate)
        again, other = other.step(again, aggregate)
        for name, tensor in stack.items():
            assert torch.equal(tensor, again[name])


def test_a_tensor_that_was_made_anew_has_no_past(start: Tensors) -> None:
    server = ServerOptimizer(AggregationSpec(optimizer="momentum"))
    _, server = server.step(start, {name: tensor + 1 for name, tensor in start.items()})
    after, _ = server.without(["head"]).step(start, dict(start))  # the clients change nothing
    assert torch.equal(after["head"], start["head"])
    assert not torch.equal(after["low"], start["low"])


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
def test_a_step_leaves_the_optimizer_and_the_stack_as_they_were(
    start: Tensors, optimizer: Literal["momentum", "adam", "yogi"]
) -> None:
    """Two steps from one state are the same: what a round changes is a new value, and the old one is still there."""
    aggregate = aggregates(start)[0]
    _, server = ServerOptimizer(AggregationSpec(optimizer=optimizer)).step(start, aggregate)
    kept = {name: tensor.clone() for name, tensor in (start | server.tensors).items()}
    first, second = server.step(start, aggregate), server.step(start, aggregate)
    for ours, theirs in ((first[0], second[0]), (first[1].tensors, second[1].tensors), (kept, start | server.tensors)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
