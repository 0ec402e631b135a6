"""The trained part of a model: a bottleneck **Adapter** after each layer of the chain, and a **Head** on top.

An **AdapterStack** holds them all; its ``state_dict`` is what is committed, sent to clients and saved. Adapters and head
compute in float32 whatever the base model's dtype: they are a few per cent of the work, and small updates survive.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from chainfed_ray.seeds import derive

Tensors = dict[str, Tensor]


class Adapter(nn.Module):
    """h = u + Up(GELU(Down(u))), with Down [R, D] and Up [D, R] as ``nn.Linear`` keeps them (Houlsby et al., 2019).

    Up starts at zero, so a new adapter is the identity. Down's initial weights follow from ``seed``.
    """

    def __init__(self, hidden: int, bottleneck: int, seed: int = 0) -> None:
        super().__init__()
        # skip_init: the values are ours, and torch's global generator stays where it was.
        self.down: nn.Linear = nn.utils.skip_init(nn.Linear, hidden, bottleneck)  # type: ignore[assignment]
        self.up: nn.Linear = nn.utils.skip_init(nn.Linear, bottleneck, hidden)  # type: ignore[assignment]
        bound = 1 / math.sqrt(hidden)
        generator = torch.Generator().manual_seed(seed)
        nn.init.uniform_(self.down.weight, -bound, bound, generator=generator)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D], in the dtype of ``hidden``."""
        change: Tensor = self.up(nn.functional.gelu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + change.to(hidden.dtype)


class Head(nn.Module):
    """A linear classifier over LayerNorm of the mean of the real tokens; it starts at zero: all classes alike."""

    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.linear: nn.Linear = nn.utils.skip_init(nn.Linear, hidden, classes)  # type: ignore[assignment]
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Hidden [B, T, D] and mask [B, T] → logits [B, C]."""
        logits: Tensor = self.linear(self.norm(mean_over_tokens(hidden.float(), mask)))
        return logits


def mean_over_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, T, D] and [B, T] → [B, D], padding left out."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


class AdapterStack(nn.Module):
    """The adapters of some layers, and the head."""

    def __init__(self, adapters: dict[int, Adapter], head: Head) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({str(layer): adapters[layer] for layer in sorted(adapters)})
        self.head = head

    @classmethod
    def new(cls, layers: Iterable[int], hidden: int, bottleneck: int, classes: int, seed: int) -> "AdapterStack":
        """Identity adapters after ``layers`` of width D = ``hidden``, and a zero head for C = ``classes``."""
        made = {layer: Adapter(hidden, bottleneck, derive(seed, "adapter", layer)) for layer in layers}
        return cls(made, Head(hidden, classes))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have an adapter, upwards."""
        return tuple(int(layer) for layer in self.adapters)

    def adapter(self, layer: int) -> Adapter:
        """The adapter that follows ``layer``."""
        adapter: Adapter = self.adapters[str(layer)]  # type: ignore[assignment]
        return adapter

    def tensors(self) -> Tensors:
        """Copies of every tensor by name: ``adapters.<layer>.down.weight``, …, ``head.linear.bias``."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> "AdapterStack":
        """The stack that ``tensors()`` was called on."""
        layers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("adapters.")})
        classes, hidden = tensors["head.linear.weight"].shape
        bottleneck = tensors[f"adapters.{layers[0]}.down.weight"].shape[0] if layers else 1
        stack = cls.new(layers, hidden, bottleneck, classes, seed=0)
        stack.load_state_dict(tensors)
        return stack
