"""The trained part of a model: an adapter for each layer of the chain, and a **Head** on top.

There are two kinds of adapters. A bottleneck **Adapter** follows its layer. A **Lora** is inside its layer, beside the layer's
linear modules. An **AdapterStack** holds adapters of one kind and the head; its ``state_dict`` is what is committed, sent to
clients and saved. Adapters and head compute in float32 whatever the base model's dtype is: they are a few per cent of the work,
and lower precision would lose small updates.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from chainfed_ray.model.pooling import append_pooled, no_features
from chainfed_ray.seeds import derive

LORA_SCALE = 2.0  # α/r, the factor of what a LoRA adds

Tensors = dict[str, Tensor]
LoraShapes = Mapping[int, Mapping[str, tuple[int, int]]]
"""The linear modules that a LoRA is on: for each layer their K and N, by their paths in the layer."""


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


class LowRank(nn.Module):
    """What a linear module of a layer gets added: 2 · B · A · x, with weights A [r, K] and B [N, r] (LoRA: Hu et al., 2022).

    B starts at zero, so that it adds nothing. The factor α/r is 2 whatever the rank is. ``seed`` determines A's initial
    weights; without a seed the weights are on the meta device.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, seed: int | None = None) -> None:
        super().__init__()
        blank = seed is None
        self.lora_A, self.lora_B = (_linear(*shape, blank, bias=False) for shape in ((inputs, rank), (rank, outputs)))
        self.further: tuple[Tensor, Tensor] | None = None  # A and B of ranks that a client with fewer does not train
        if seed is not None:
            bound = 1 / math.sqrt(inputs)
            nn.init.uniform_(self.lora_A.weight, -bound, bound, generator=torch.Generator().manual_seed(seed))
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., K] → [..., N], in the dtype of ``inputs``."""
        first, second = self.lora_A.weight, self.lora_B.weight
        if self.further:
            first, second = torch.cat([first, self.further[0]]), torch.cat([second, self.further[1]], 1)
        change = nn.functional.linear(nn.functional.linear(inputs.to(first.dtype), first), second) * LORA_SCALE
        return change.to(inputs.dtype)


def rank_axis(name: str) -> int | None:
    """The axis of the ranks in the tensor called ``name``: they are rows of A and columns of B; None for other tensors."""
    return {"lora_A.weight": 0, "lora_B.weight": 1}.get(".".join(name.split(".")[-2:]))


def of_ranks(tensors: Mapping[str, Tensor], ranks: slice) -> Tensors:
    """These ``ranks`` of the LoRAs among ``tensors``, as views; other tensors are whole."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if (axis := rank_axis(name)) is not None:
            found[name] = tensor[:, ranks] if axis else tensor[ranks]
    return found


def change(start: Tensor, trained: Tensor) -> Tensor:
    """``trained`` − ``start`` as a new contiguous tensor in float64."""
    copy = trained.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    return copy.sub_(start)


class Lora(nn.Module):
    """The LoRA of one layer: a ``LowRank`` for each of its linear modules in ``shapes``, which has their K and N by path.

    The names of its tensors are PEFT's, such as ``self_attn.q_proj.lora_A.weight``.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int | None = None) -> None:
        super().__init__()
        self.paths = tuple(sorted(shapes))
        for path in self.paths:
            inside: nn.Module = self
            for name in path.split(".")[:-1]:
                if not hasattr(inside, name):
                    inside.add_module(name, nn.Module())
                inside = inside.get_submodule(name)
            own = None if seed is None else derive(seed, path)
            inside.add_module(path.rpartition(".")[2], LowRank(*shapes[path], rank, own))

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> "Lora":
        """A LoRA of these sizes on the meta device. ``tensors`` has A and B of each module.

        Raises:
            ValueError: A and B do not fit each other.
        """
        shapes, ranks = dict[str, tuple[int, int]](), set[int]()
        for name, tensor in tensors.items():
            path, _, rest = name.rpartition(".lora_A.")
            if rest == "weight":
                (rank, inputs), (outputs, other) = tensor.shape, tensors[f"{path}.lora_B.weight"].shape
                shapes[path], ranks = (inputs, outputs), ranks | {rank, other}
        if len(ranks) != 1:
            raise ValueError(f"a LoRA of the ranks {sorted(ranks)}, not of one")
        return cls(shapes, ranks.pop())

    def part(self, path: str) -> LowRank:
        """What the module at ``path`` gets added."""
        part: LowRank = self.get_submodule(path)  # type: ignore[assignment]
        return part

    @property
    def rank(self) -> int:
        """r, the same for all modules."""
        return int(self.part(self.paths[0]).lora_A.out_features)

    @property
    def is_identity(self) -> bool:
        """True if the LoRA changes nothing, as before it is trained."""
        return not any(self.part(path).lora_B.weight.any() for path in self.paths)


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


def _adapter_for(tensors: Tensors) -> Adapter | Lora:
    """An adapter of the sizes of these tensors, on the meta device."""
    if "down.weight" not in tensors:
        return Lora.from_tensors(tensors)
    bottleneck, hidden = tensors["down.weight"].shape
    return Adapter(hidden, bottleneck)


def _head_for(tensors: Tensors) -> Head | None:
    if "head.linear.weight" not in tensors:
        return None
    (classes, features), (hidden,) = tensors["head.linear.weight"].shape, tensors["head.norm.weight"].shape
    if not hidden or not features or features % hidden:
        raise ValueError(f"a head of {features} features does not fit layers of width {hidden}")
    return Head(hidden, classes, features // hidden)


class _Blank(nn.Linear):
    """A linear layer without initial values. ``skip_init`` of torch makes it too, six times as slowly."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are. Torch's own initialisation would advance the global random generator."""


def _linear(inputs: int, outputs: int, blank: bool = False, bias: bool = True) -> nn.Linear:
    """A linear layer without initial values; a ``blank`` one is on the meta device."""
    return _Blank(inputs, outputs, bias=bias, device="meta" if blank else "cpu")


class Adapted(Protocol):
    """What the forward pass needs of the adapters: those of one stack, or of a stack for each row of a batch."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have an adapter, from the bottom to the top."""
        ...

    def after(self, layer: int) -> Callable[[Tensor], Tensor] | None:
        """What follows ``layer``: [B, T, D] → [B, T, D]; None if nothing does."""
        ...

    def inside(self, layer: int) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """What the linear modules inside ``layer`` get added, by their paths: [B, T, K] → [B, T, N]."""
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

    def __init__(self, adapters: Mapping[int, Adapter | Lora], head: Head | None) -> None:
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

    @classmethod
    def new_lora(cls, shapes: LoraShapes, rank: int, seed: int, head: Head | None = None) -> "AdapterStack":
        """A new stack of LoRAs that change nothing. ``shapes`` has each layer's linear modules, as ``Lora`` takes them."""
        return cls({layer: Lora(of, rank, derive(seed, "adapter", layer)) for layer, of in shapes.items()}, head)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have an adapter, from the bottom to the top."""
        return tuple(int(layer) for layer in self.adapters)

    @property
    def is_lora(self) -> bool:
        """True if the adapters are inside their layers."""
        return any(isinstance(adapter, Lora) for adapter in self.adapters.values())

    def below(self, layer: int) -> int:
        """The highest layer whose output does not depend on the adapter of ``layer``; -1 stands for the embeddings.

        A bottleneck follows the output of its own layer.
        """
        return layer - 1 if self.is_lora else layer

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

    def up_to(self, top: int) -> "AdapterStack":
        """The adapters up to the layer ``top``, and the head. They are shared, not copied."""
        return AdapterStack({layer: self.part(layer) for layer in self.layers if layer <= top}, self.head)

    def is_new(self, top: int) -> bool:
        """True if the adapters up to the layer ``top`` are the identity, as before they are trained."""
        return all(self.part(layer).is_identity for layer in self.layers if layer <= top)

    def part(self, layer: int) -> Adapter | Lora:
        """The adapter of ``layer``."""
        part: Adapter | Lora = self.adapters[str(layer)]  # type: ignore[assignment]
        return part

    def adapter(self, layer: int) -> Adapter:
        """The bottleneck that follows ``layer``."""
        adapter = self.part(layer)
        assert isinstance(adapter, Adapter), "a stack of bottlenecks"
        return adapter

    def lora(self, layer: int) -> Lora:
        """The LoRA inside ``layer``."""
        lora = self.part(layer)
        assert isinstance(lora, Lora), "a stack of LoRAs"
        return lora

    def after(self, layer: int) -> Adapter | None:
        """See ``Adapted``."""
        return self.adapter(layer) if layer in self.layers and not self.is_lora else None

    def inside(self, layer: int) -> Mapping[str, LowRank]:
        """See ``Adapted``."""
        lora = self.part(layer) if layer in self.layers else None
        return {path: lora.part(path) for path in lora.paths} if isinstance(lora, Lora) else {}

    def tensors(self) -> Tensors:
        """Copies of every tensor by name: ``adapters.<layer>.down.weight``, …, ``head.linear.bias``.

        Those of a LoRA are called ``adapters.<layer>.<path>.lora_A.weight``, …
        """
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> "AdapterStack":
        """The stack with these ``tensors``, which it uses without copying them.

        Raises:
            ValueError: the tensors of the head, or of a LoRA, do not fit each other.
        """
        layers: dict[int, Tensors] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "adapters":
                layer, _, own = rest.partition(".")
                layers.setdefault(int(layer), {})[own] = tensor
        stack = cls({layer: _adapter_for(own) for layer, own in layers.items()}, _head_for(tensors))
        stack.load_state_dict(tensors, assign=True)
        return stack
