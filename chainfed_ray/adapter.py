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

    Up starts at zero, so a new adapter is the identity. Down's initial weights follow from ``seed``; without one there are
    no values yet, and no memory is taken for them.
    """

    def __init__(self, hidden: int, bottleneck: int, seed: int | None = None) -> None:
        super().__init__()
        self.down, self.up = _linear(hidden, bottleneck, seed is None), _linear(bottleneck, hidden, seed is None)
        if seed is None:
            return
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
        self.linear = _linear(hidden, classes)
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


def _linear(inputs: int, outputs: int, blank: bool = False) -> nn.Linear:
    """A linear layer whose values are ours to give: torch's global generator stays where it was."""
    made: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, device="meta" if blank else "cpu")  # type: ignore[assignment]
    return made


class AdapterStack(nn.Module):
    """The adapters of some layers, and the head; none for a language model, whose own head is not trained."""

    def __init__(self, adapters: dict[int, Adapter], head: Head | None) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({str(layer): adapters[layer] for layer in sorted(adapters)})
        self.head = head

    @classmethod
    def new(cls, layers: Iterable[int], hidden: int, bottleneck: int, classes: int | None, seed: int) -> "AdapterStack":
        """Identity adapters after ``layers`` of width D = ``hidden``, and a zero head for C = ``classes``, if there are any."""
        made = {layer: Adapter(hidden, bottleneck, derive(seed, "adapter", layer)) for layer in layers}
        return cls(made, None if classes is None else Head(hidden, classes))

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
        """The stack that ``tensors()`` was called on. It is made of these very tensors: nothing is copied."""
        downs = {name.split(".")[1]: tensor for name, tensor in tensors.items() if name.endswith(".down.weight")}
        adapters = {int(layer): Adapter(down.shape[1], down.shape[0]) for layer, down in downs.items()}
        linear = tensors.get("head.linear.weight")
        stack = cls(adapters, None if linear is None else Head(linear.shape[1], linear.shape[0]))
        stack.load_state_dict(tensors, assign=True)
        return stack
