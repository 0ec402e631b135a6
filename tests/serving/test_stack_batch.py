"""Rows of one batch go through adapters of their own, whoever comes and goes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.serving.stack_batch import AdapterRows, adapters_of

LINEAR = {"attention.query": (16, 16), "mlp.up": (16, 24)}  # the modules that a LoRA is on


@given(moves=st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=12))
@settings(deadline=None)
def test_rows_that_come_and_go_have_the_adapters_that_they_have_alone(moves: list[tuple[bool, int]]) -> None:
    """Stacks with other layers and other sizes, with LoRAs inside layers, or with none at all."""
    stacks = [
        None,
        random_stack((0, 1), 4, 0),
        random_stack((1, 2), 8, 1),
        random_stack((2,), 3, 2),
        random_stack((0, 1, 2), 5, 3),
        random_lora((0, 1), 2, 4),
        random_lora((1, 2), 4, 5),
    ]
    rows, plain = AdapterRows(), list[AdapterStack | None]()
    hidden = torch.randn(12, 3, 16, generator=torch.Generator().manual_seed(0))
    places = [(layer, path) for layer in range(3) for path in ("", *LINEAR)]
    for joins, which in moves:
        if joins or not plain:
            rows.join(stacks[which])
            plain.append(stacks[which])
        else:
            place = which % len(plain)
            rows.leave(place)
            plain[place] = plain[-1]
            plain.pop()
        if not plain:
            continue
        found = rows.adapters()
        for place in places:
            unchanged = hidden[: len(plain)] if not place[1] else torch.zeros(len(plain), 3, LINEAR[place[1]][1])
            ours = found[place](hidden[: len(plain)]) if place in found else unchanged
            for row, stack in enumerate(plain):
                alone = adapters_of([stack])
                theirs = alone[place](hidden[row : row + 1]) if place in alone else unchanged[row : row + 1]
                torch.testing.assert_close(ours[row : row + 1], theirs)


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
