"""Stacks of random values for a base model, where a time or a size is measured: it does not depend on the values."""

import torch

from chainfed_ray.hub import resolve
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.saved_stack import SavedStack

_MAX_LENGTH = 64


class RandomStacks:
    """Makes stacks with an adapter of ``bottleneck`` numbers after every layer of ``base``."""

    def __init__(self, base: str, bottleneck: int) -> None:
        self._base, self._bottleneck = base, bottleneck
        self._blocks = Blocks(resolve(base), torch.float32)
        self._blocks.close()

    def stack(self, seed: int, classes: int | None, head_layers: int = 1) -> SavedStack:
        """The stack of a seed: a classifier's, or without classes that of a language model."""
        blocks = self._blocks
        stack = AdapterStack.new(
            range(blocks.num_layers), blocks.hidden_size, self._bottleneck, classes, seed, head_layers=head_layers
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in stack.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        path = blocks.layers_path if classes else blocks.causal_layers_path
        return SavedStack(stack, tuple(map(str, range(classes or 0))), _MAX_LENGTH, self._base, path)
