"""GPO: loss = local + λ · global, and what the global loss may move."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from chainfed_ray.chain import Window
from chainfed_ray.client.objective import chain_loss, classification_loss, trained_names
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.pooling import LayerStates, no_features
from tests.models import a_stack

LAMBDA = 0.3
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
LABELS = torch.tensor([1, 0])


def hidden() -> Tensor:
    return torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(7))


def read() -> Tensor:
    """Of two layers below the window's top."""
    return torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(8))


def logits(stack: AdapterStack, layers: list[int]) -> Tensor:
    """The head's, after the adapters of ``layers``, written down again from the formulas."""
    state = hidden()
    pooled = [*read().unbind(1), torch.stack([state[0].mean(0), state[1, :2].mean(0)])]
    for layer in layers:
        adapter = stack.adapter(layer)
        inner = torch.nn.functional.gelu(state @ adapter.down.weight.T + adapter.down.bias)
        state = state + inner @ adapter.up.weight.T + adapter.up.bias
        pooled.append(torch.stack([state[0].mean(0), state[1, :2].mean(0)]))
    norm, found = stack.head.norm, stack.head.linear.bias
    for place, one in enumerate(reversed(pooled[-stack.head_layers :]), start=1):
        centred = one - one.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
        columns = stack.head.linear.weight[:, (stack.head_layers - place) * 32 : (stack.head_layers - place + 1) * 32]
        found = found + scaled @ columns.T
    return found


def ours(stack: AdapterStack, window: Window, head_follows_global: bool = True, weight: float = LAMBDA) -> Tensor:
    options: dict[str, Any] = {"global_weight": weight, "head_follows_global": head_follows_global}
    states = LayerStates(hidden(), read()[:, 3 - stack.head_layers :])
    return chain_loss(stack, window, states, MASK, classification_loss(stack.head, MASK, LABELS), **options)


def total(found: Tensor) -> Tensor:
    return cross_entropy(found, LABELS, reduction="sum")


@pytest.mark.parametrize("head_layers", [1, 2, 3])
def test_the_formula(head_layers: int) -> None:
    stack = a_stack(range(1, 5), head_layers=head_layers)
    local, ahead = total(logits(stack, [])), total(logits(stack, [3, 4]))
    assert abs(local - ahead) > 0.1
    torch.testing.assert_close(ours(stack, Window(1, 2)), local + LAMBDA * ahead)
    torch.testing.assert_close(ours(stack, Window(1, 2), weight=0), local)


def test_at_the_top_there_is_only_the_end_to_end_loss() -> None:
    stack = a_stack(range(1, 5))
    torch.testing.assert_close(ours(stack, Window(3, 4)), total(logits(stack, [])))


@pytest.mark.parametrize("follows", [True, False])
def test_the_head_follows_the_global_loss_or_does_not(follows: bool) -> None:
    stack = a_stack(range(1, 5))
    wanted = total(logits(stack, [])) + (LAMBDA * total(logits(stack, [3, 4])) if follows else 0)
    (expected,) = torch.autograd.grad(wanted, [stack.head.linear.weight])
    (found,) = torch.autograd.grad(ours(stack, Window(1, 2), follows), [stack.head.linear.weight])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("follows", [True, False])
def test_the_window_always_follows_the_global_loss(follows: bool) -> None:
    stack = a_stack(range(1, 5))
    state = hidden().requires_grad_()
    judge = classification_loss(stack.head, MASK, LABELS)
    states = LayerStates(state, no_features(state))
    loss = chain_loss(stack, Window(1, 2), states, MASK, judge, global_weight=LAMBDA, head_follows_global=follows)
    (found,) = torch.autograd.grad(loss, [state])
    (local,) = torch.autograd.grad(total(stack.head(state, MASK)), [state])
    assert (found - local).abs().max() > 1e-3


def test_what_is_trained_and_sent() -> None:
    stack = a_stack(range(1, 5))

    def layers(weight: float, trains: Any) -> set[str]:
        names = trained_names(stack.tensors(), Window(1, 2), weight, trains)
        assert {name for name in names if name.startswith("head.")} == {
            f"head.{name}" for name in stack.head.state_dict()
        }
        return {name.split(".")[1] for name in names if name.startswith("adapters.")}

    assert layers(LAMBDA, "window") == layers(LAMBDA, "head") == layers(0, "upper") == {"1", "2"}
    assert layers(LAMBDA, "upper") == {"1", "2", "3", "4"}
