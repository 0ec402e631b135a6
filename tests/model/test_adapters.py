"""Promise: what is made of a seed, or of tensors, takes nothing from torch's own random numbers."""

import torch

from chainfed_ray.model.adapters import AdapterStack, Tensors
from tests.builders import assert_same


def made(seed: int) -> list[Tensors]:
    """The tensors of new stacks of both kinds."""
    loras = {layer: {"q": (8, 8), "k": (8, 4)} for layer in range(2)}
    stacks = AdapterStack.new(range(2), 8, 4, 3, seed, head_layers=2), AdapterStack.new_lora(loras, 2, seed)
    return [stack.tensors() for stack in stacks]


def test_new_stacks_follow_from_their_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = made(seed=5)
    for tensors in first:
        assert_same(AdapterStack.from_tensors(tensors).tensors(), tensors)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    for tensors, again in zip(first, made(seed=5), strict=True):
        assert_same(tensors, again)
