"""The trained part of a model: a bottleneck **Adapter** after each layer of the chain, and a **Head** on top.

An **AdapterStack** holds them all; its ``state_dict`` is what is committed, sent to clients and saved. Adapters and head
compute in float32 whatever the base model's dtype is: they are a few per cent of the work, and lower precision would lose small
updates.
"""

import math
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from chainfed_ray.model.pooling import append_pooled, no_features
from chainfed_ray.seeds import derive

Tensors = dict[str, Tensor]


class Adapter(nn.Module):
    """h = u + Up(GELU(Down(u))), with weights Down [R, D] and Up [D, R] in the layout of ``nn.Linear`` (Houlsby et al., 2019).

    Up starts at zero, so a new adapter is the identity. ``seed`` determines Down's initial weights. Without a seed the weights
    are on the meta device: they have no values and take no memory.
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
        """True if the adapter changes nothing, as before it is trained."""
        return not (self.up.weight.any() or self.up.bias.any())

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D], in the dtype of ``hidden``."""
        change: Tensor = self.up(nn.functional.gelu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + change.to(hidden.dtype)


class Head(nn.Module):
    """A linear classifier over pooled features: the LayerNorm of the mean over an example's tokens, for each of ``layers``
    layers.

    The highest layer's features come last. The weights start at zero, so that all classes are equally likely.
    """

    def __init__(self, hidden: int, classes: int, layers: int = 1) -> None:
        super().__init__()
        self.layers = layers
        self.norm = nn.LayerNorm(hidden)
        self.linear = _linear(layers * hidden, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def features(self, top: int) -> int:
        """The number of features F that the head uses when its top layer is ``top``."""
        return min(self.layers, top + 1) * self.norm.weight.shape[0]

    def forward(self, hidden: Tensor, mask: Tensor, below: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D], mask [B, T] and the pooled features of r layers ``below`` [B, r, D], if any → logits [B, C].

        If there are fewer layers than the head can use, the lowest count as zero.
        """
        below = no_features(hidden) if below is None else below
        features = self.norm(append_pooled(below, hidden, mask, self.layers)).flatten(1)
        return nn.functional.linear(features, self.linear.weight[:, -features.shape[1] :], self.linear.bias)


def _head_for(tensors: Tensors) -> Head | None:
    if "head.linear.weight" not in tensors:
        return None
    (classes, features), (hidden,) = tensors["head.linear.weight"].shape, tensors["head.norm.weight"].shape
    if not hidden or not features or features % hidden:
        raise ValueError(f"a head of {features} features does not fit layers of width {hidden}")
    return Head(hidden, classes, features // hidden)


def _linear(inputs: int, outputs: int, blank: bool = False) -> nn.Linear:
    """A linear layer without initial values. Torch's own initialisation would advance the global random generator."""
    made: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, device="meta" if blank else "cpu")  # type: ignore[assignment]
    return made


class Adapted(Protocol):
    """What the forward pass needs of the adapters: those of one stack, or of a stack for each row of a batch."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have an adapter, from the bottom to the top."""
        ...

    def adapter(self, layer: int) -> Callable[[Tensor], Tensor]:
        """The adapter that follows ``layer``: [B, T, D] → [B, T, D]."""
        ...

    def pool(self, pooled: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """The pooled features for the next layer up: ``pooled`` [B, r, D], and those of a layer's output
        ``hidden`` [B, T, D].
        """
        ...


class AdapterStack(nn.Module):
    """The adapters of some layers, and a classifier's head.

    ``head`` is None for a language model, whose own head is not trained.
    """

    def __init__(self, adapters: dict[int, Adapter], head: Head | None) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({str(layer): adapters[layer] for layer in sorted(adapters)})
        self.head = head

    @classmethod
    def new(
        cls, layers: Iterable[int], hidden: int, bottleneck: int, classes: int | None, seed: int, head_layers: int = 1
    ) -> "AdapterStack":
        """A new stack of identity adapters after ``layers``, of width D = ``hidden``.

        It has a head at zero for C = ``classes``, over ``head_layers`` layers; or none if ``classes`` is None.
        """
        made = {layer: Adapter(hidden, bottleneck, derive(seed, "adapter", layer)) for layer in layers}
        return cls(made, None if classes is None else Head(hidden, classes, head_layers))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have an adapter, from the bottom to the top."""
        return tuple(int(layer) for layer in self.adapters)

    @property
    def head_layers(self) -> int:
        """How many layers the head uses. A language model's own head uses one."""
        return 1 if self.head is None else self.head.layers

    @property
    def pooled_layers(self) -> int:
        """How many layers below the top one the head uses."""
        return self.head_layers - 1

    def pool(self, pooled: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """The pooled features for the next layer up: ``pooled`` [B, r, D], and those of a layer's output
        ``hidden`` [B, T, D].
        """
        return append_pooled(pooled, hidden, mask, self.pooled_layers)

    def is_new(self, top: int) -> bool:
        """True if the adapters up to the layer ``top`` are the identity, as before they are trained."""
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
        """The stack with these ``tensors``, which it uses without copying them.

        Raises:
            ValueError: the head's tensors do not fit each other.
        """
        downs = {name.split(".")[1]: tensor for name, tensor in tensors.items() if name.endswith(".down.weight")}
        adapters = {int(layer): Adapter(down.shape[1], down.shape[0]) for layer, down in downs.items()}
        stack = cls(adapters, _head_for(tensors))
        stack.load_state_dict(tensors, assign=True)
        return stack
