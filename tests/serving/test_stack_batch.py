"""Rows of one batch go through adapters of their own, whoever comes and goes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.serving.stack_batch import AdapterRows, adapters_of


@given(moves=st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=12))
@settings(deadline=None)
def test_rows_that_come_and_go_have_the_adapters_that_they_have_alone(moves: list[tuple[bool, int]]) -> None:
    """Stacks with other layers and other bottlenecks, or with none at all."""
    stacks = [
        None,
        random_stack((0, 1), 4, 0),
        random_stack((1, 2), 8, 1),
        random_stack((2,), 3, 2),
        random_stack((0, 1, 2), 5, 3),
    ]
    rows, plain = AdapterRows(), list[AdapterStack | None]()
    hidden = torch.randn(12, 3, 16, generator=torch.Generator().manual_seed(0))
    for joins, which in moves:
        if joins or not plain:
            rows.join(stacks[which])
            plain.append(stacks[which])
        else:
            place = which % len(plain)
            rows.leave(place)
            plain[place] = plain[-1]
            plain.pop()
        found, expected = (rows.adapters() if plain else {}), (adapters_of(plain) if plain else {})
        for layer in range(3):
            ours, theirs = (
                given[layer](hidden[: len(plain)]) if layer in given else hidden[: len(plain)]
                for given in (found, expected)
            )
            torch.testing.assert_close(ours, theirs)


def random_stack(layers: tuple[int, ...], bottleneck: int, seed: int) -> AdapterStack:
    stack = AdapterStack.new(layers, 16, bottleneck, None, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return stack
