"""The trained part of a model: a bottleneck **Adapter** after each layer of the chain, and a **Head** on top.

An **AdapterStack** holds them all; its ``state_dict`` is what is committed, sent to clients and saved. Adapters and head
compute in float32 whatever the base model's dtype: they are a few per cent of the work, and small updates survive.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from chainfed_ray.model.pooling import append_pooled, no_features
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

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing, as it does before it is trained."""
        return not (self.up.weight.any() or self.up.bias.any())

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D], in the dtype of ``hidden``."""
        change: Tensor = self.up(nn.functional.gelu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + change.to(hidden.dtype)


class Head(nn.Module):
    """A linear classifier over LayerNorm of the means of the real tokens, of as many ``layers``, the highest last.

    It starts at zero: all classes alike.
    """

    def __init__(self, hidden: int, classes: int, layers: int = 1) -> None:
        super().__init__()
        self.layers = layers
        self.norm = nn.LayerNorm(hidden)
        self.linear = _linear(layers * hidden, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def features(self, top: int) -> int:
        """How many numbers it reads of an example above the layer ``top``."""
        return min(self.layers, top + 1) * self.norm.weight.shape[0]

    def forward(self, hidden: Tensor, mask: Tensor, below: Tensor | None = None) -> Tensor:
        """Hidden [B, T, D], mask [B, T] and what was read ``below``, [B, r, D] or nothing → logits [B, C].

        Where there are fewer layers than it could read, it is as if the lower ones were zero.
        """
        below = no_features(hidden) if below is None else below
        features = self.norm(append_pooled(below, hidden, mask, self.layers)).flatten(1)
        return nn.functional.linear(features, self.linear.weight[:, -features.shape[1] :], self.linear.bias)


def _head_for(tensors: Tensors) -> Head | None:
    if "head.linear.weight" not in tensors:
        return None
    (classes, features), (hidden,) = tensors["head.linear.weight"].shape, tensors["head.norm.weight"].shape
    if not hidden or not features or features % hidden:
        raise ValueError(f"a head of {features} features reads no number of layers of {hidden}")
    return Head(hidden, classes, features // hidden)


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
    def new(
        cls, layers: Iterable[int], hidden: int, bottleneck: int, classes: int | None, seed: int, head_layers: int = 1
    ) -> "AdapterStack":
        """Identity adapters after ``layers`` of width D = ``hidden``, and a zero head for C = ``classes``, if there are any.

        The head reads so many layers.
        """
        made = {layer: Adapter(hidden, bottleneck, derive(seed, "adapter", layer)) for layer in layers}
        return cls(made, None if classes is None else Head(hidden, classes, head_layers))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have an adapter, upwards."""
        return tuple(int(layer) for layer in self.adapters)

    @property
    def head_layers(self) -> int:
        """How many layers its head reads; a language model's own reads one."""
        return 1 if self.head is None else self.head.layers

    @property
    def pooled_layers(self) -> int:
        """How many of them are below the one at whose top it stands."""
        return self.head_layers - 1

    def pool(self, pooled: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """What comes up to the next layer past one that gives ``hidden`` [B, T, D], below which was ``pooled`` [B, r, D]."""
        return append_pooled(pooled, hidden, mask, self.pooled_layers)

    def is_new(self, top: int) -> bool:
        """Whether its adapters up to the layer ``top`` are the identity, as they are before they have been trained."""
        return all(self.adapter(layer).is_identity for layer in self.layers if layer <= top)

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
        stack = cls(adapters, _head_for(tensors))
        stack.load_state_dict(tensors, assign=True)
        return stack
