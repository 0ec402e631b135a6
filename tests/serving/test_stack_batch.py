"""Rows of one batch go through adapters of their own, whoever comes and goes."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.serving.stack_batch import AdapterRows, adapters_of

LINEAR = {"attention.query": (16, 16), "mlp.up": (16, 24)}  # the modules that a LoRA is on


@pytest.mark.slow
@given(moves=st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=12))
@settings(deadline=None)
def test_rows_that_come_and_go_have_the_adapters_that_they_have_alone(moves: list[tuple[bool, int]]) -> None:
    """Stacks with other layers and other sizes, with LoRAs inside layers, or with none at all."""
    rows, plain = AdapterRows(), list[int]()
    places = [(layer, path) for layer in range(3) for path in ("", *LINEAR)]
    for joins, which in moves:
        if joins or not plain:
            rows.join(stacks()[which])
            plain.append(which)
        else:
            place = which % len(plain)
            rows.leave(place)
            plain[place] = plain[-1]
            plain.pop()
        if not plain:
            continue
        found, hidden = rows.adapters(), inputs()[: len(plain)]
        for place in places:
            ours = found[place](hidden) if place in found else unchanged(hidden, place[1])
            for row, stack in enumerate(plain):
                torch.testing.assert_close(ours[row : row + 1], alone(stack, row, place))


@cache
def stacks() -> list[AdapterStack | None]:
    return [
        None,
        random_stack((0, 1), 4, 0),
        random_stack((1, 2), 8, 1),
        random_stack((2,), 3, 2),
        random_stack((0, 1, 2), 5, 3),
        random_lora((0, 1), 2, 4),
        random_lora((1, 2), 4, 5),
    ]


@cache
def inputs() -> Tensor:
    return torch.randn(12, 3, 16, generator=torch.Generator().manual_seed(0))


@cache
def alone(stack: int, row: int, place: tuple[int, str]) -> Tensor:
    """What comes out for a row if its stack is the only one."""
    adapters, hidden = adapters_of([stacks()[stack]]), inputs()[row : row + 1]
    return adapters[place](hidden) if place in adapters else unchanged(hidden, place[1])


def unchanged(hidden: Tensor, path: str) -> Tensor:
    """Without an adapter: the states behind a layer are as they were, and to a module's output nothing is added."""
    return torch.zeros(len(hidden), 3, LINEAR[path][1]) if path else hidden


def random_stack(layers: tuple[int, ...], bottleneck: int, seed: int) -> AdapterStack:
    return with_values(AdapterStack.new(layers, 16, bottleneck, None, seed), seed)


def random_lora(layers: tuple[int, ...], rank: int, seed: int) -> AdapterStack:
    return with_values(AdapterStack.new_lora(dict.fromkeys(layers, LINEAR), rank, seed), seed)


def with_values(stack: AdapterStack, seed: int) -> AdapterStack:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return stack
