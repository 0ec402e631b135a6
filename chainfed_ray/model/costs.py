"""Makes the memory profile of a base model and its stack for the planner, by tracing the parts of a client's turn."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode  # it has no public name; the version of torch is pinned
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves, tree_map

from chainfed_ray.budget.demand import NO_MEMORY, MemoryProfile, PartMemory, StepMemory, largest_of
from chainfed_ray.budget.kept_profiles import kept_profile
from chainfed_ray.model.adapters import Adapter, Head, Lora, LoraShapes
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import added
from chainfed_ray.model.lm_head import next_token_loss
from chainfed_ray.model.trace import Prepare, polynomial_of, trace_memory, with_blank_weights
from chainfed_ray.model.trunk import LayerCall
from chainfed_ray.streaming.activations import overwrite_activations
from chainfed_ray.streaming.matrices import SLICE_BYTES
from chainfed_ray.streaming.unchanged import while_unchanged

_FLOAT32 = 4
# Measured: the bytes of a module without weights, as a Python object; of the names and places of a tensor that is part of a
# parameter; and of oneDNN's compiled programs, which multiply bfloat16 matrices.
_MODULE = 9 * 2**10
_PART = 2**9
_COMPILED = 2**20


def memory_profile_of(
    blocks: Blocks, bottleneck: int, classes: int | None, head_layers: int = 1, lora: LoraShapes | None = None
) -> MemoryProfile:
    """The memory profile of tuning ``blocks`` with adapters of R = ``bottleneck`` and a classifier of C = ``classes``.

    With ``lora`` the adapters are LoRAs of rank r = ``bottleneck`` inside the layers, on the modules of these shapes. The
    classifier uses the pooled features of ``head_layers`` layers. ``classes`` is None for a language model, whose own head
    is used and not trained.
    """
    ranks = {index: Lora(shapes, bottleneck) for index, shapes in (lora or {}).items()}
    parts = Parts(blocks, classes, head_layers, ranks)
    width = blocks.hidden_size

    def step(activations_offloaded: bool) -> StepMemory:
        return StepMemory(
            layer=_of_layers(parts, activations_offloaded),
            head=trace_memory(parts.head, width, blocks.dtype, activations_offloaded=activations_offloaded),
            **_of_loras(parts, activations_offloaded)
            if ranks
            else _of_adapters(width, blocks.dtype, bottleneck, activations_offloaded),
        )

    return MemoryProfile(
        layers=blocks.num_layers,
        hidden=width,
        itemsize=blocks.dtype.itemsize,
        layer=blocks.layer_bytes,
        unstreamed=blocks.unstreamed_bytes,
        # oneDNN packs a slice of bfloat16 numbers into a third buffer.
        slices=(3 if blocks.dtype == torch.bfloat16 else 2) * max(SLICE_BYTES, blocks.longest_row_bytes)
        + blocks.dequantizing_bytes,
        conversion=blocks.conversion_bytes,
        skeleton=blocks.modules * _MODULE
        + blocks.parts * _PART
        + blocks.buffer_bytes
        + (_COMPILED if blocks.dtype == torch.bfloat16 else 0),
        call=polynomial_of(parts.call_bytes),
        adapter=max(map(_lora_bytes, ranks.values())) if ranks else _adapter_bytes(width, bottleneck),
        head=0 if classes is None else (head_layers * width * classes + classes + 2 * width) * _FLOAT32,
        head_layers=head_layers,
        streamed_head=classes is None,
        inside=bool(ranks),
        kept=step(activations_offloaded=False),
        activations_offloaded=step(activations_offloaded=True),
        advance=_of_layers(parts, activations_offloaded=False, gradients=False),
        advance_adapter=NO_MEMORY if ranks else _advancing(width, blocks.dtype, bottleneck),
    )


def known_profile_of(
    blocks: Blocks, bottleneck: int, classes: int | None, head_layers: int = 1, lora: LoraShapes | None = None
) -> MemoryProfile:
    """As ``memory_profile_of``, and traced once on a machine: a process looks for what an earlier one has traced."""
    shapes = None if lora is None else tuple((index, tuple(of.items())) for index, of in lora.items())
    question = ("memory profile", blocks.dtype, bottleneck, classes, head_layers, shapes)

    def trace() -> MemoryProfile:
        return memory_profile_of(blocks, bottleneck, classes, head_layers, lora)

    return while_unchanged(blocks.folder, question, lambda: kept_profile(blocks.folder, repr(question), trace))


def with_bottleneck(memory: MemoryProfile, dtype: torch.dtype, bottleneck: int) -> MemoryProfile:
    """``memory`` with adapters of another R. ``dtype`` is the base model's. No layer and no head is traced again."""
    return replace(
        memory,
        adapter=_adapter_bytes(memory.hidden, bottleneck),
        kept=replace(memory.kept, **_of_adapters(memory.hidden, dtype, bottleneck, activations_offloaded=False)),
        activations_offloaded=replace(
            memory.activations_offloaded, **_of_adapters(memory.hidden, dtype, bottleneck, activations_offloaded=True)
        ),
        advance_adapter=_advancing(memory.hidden, dtype, bottleneck),
    )


def _of_loras(parts: "Parts", activations_offloaded: bool) -> dict[str, PartMemory]:
    """The memory of a step's layers with LoRAs that are trained, by the names of the fields of ``StepMemory``."""
    return {"adapter": _of_layers(parts, activations_offloaded, trained=True), "emulator": NO_MEMORY}


def _of_layers(
    parts: "Parts", activations_offloaded: bool, gradients: bool = True, trained: bool = False
) -> PartMemory:
    """The memory of whichever layer holds the most: a layer of each kind is traced. A LoRA inside it may be ``trained``."""
    blocks = parts.blocks
    return largest_of(
        [
            trace_memory(
                parts.layer(activations_offloaded, index, trained),
                blocks.hidden_size,
                blocks.dtype,
                gradients=gradients,
                activations_offloaded=activations_offloaded,
            )
            for index in blocks.kinds
        ]
    )


def _lora_bytes(lora: Lora) -> int:
    return sum(parameter.numel() for parameter in lora.parameters()) * _FLOAT32


def _adapter_bytes(width: int, bottleneck: int) -> int:
    return (2 * width * bottleneck + width + bottleneck) * _FLOAT32


def _of_adapters(width: int, dtype: torch.dtype, bottleneck: int, activations_offloaded: bool) -> dict[str, PartMemory]:
    """The memory of a step's adapters, by the names of the fields of ``StepMemory``."""
    return {
        name: trace_memory(
            new_adapter(width, bottleneck, trained), width, dtype, activations_offloaded=activations_offloaded
        )
        for name, trained in (("adapter", True), ("emulator", False))
    }


def _advancing(width: int, dtype: torch.dtype, bottleneck: int) -> PartMemory:
    return trace_memory(new_adapter(width, bottleneck, trained=False), width, dtype, gradients=False)


def new_adapter(width: int, bottleneck: int, trained: bool) -> Prepare:
    """Makes an adapter for tracing."""

    def prepare(fake: FakeTensorMode, batch: int, tokens: int) -> Callable[[Tensor], Tensor]:
        return with_blank_weights(Adapter(width, bottleneck).requires_grad_(trained), fake)

    return prepare


@dataclass(frozen=True)
class Parts:
    """Makes the parts of a step for tracing."""

    blocks: Blocks
    classes: int | None
    head_layers: int
    loras: Mapping[int, Lora] = field(default_factory=dict)
    _known_calls: dict[tuple[int, int], list[LayerCall]] = field(default_factory=dict, init=False, repr=False)

    def layer(self, activations_offloaded: bool, index: int = 0, trained: bool = False) -> Prepare:
        """Makes a layer of the base model, with the LoRA inside it, if there is one, which may be ``trained``."""
        return lambda fake, batch, tokens: self._layer(fake, batch, tokens, activations_offloaded, index, trained)

    def _layer(
        self, fake: FakeTensorMode, batch: int, tokens: int, activations_offloaded: bool, index: int, trained: bool
    ) -> Callable[[Tensor], Tensor]:
        real = self._calls(batch, tokens)[index]
        with fake:
            call = LayerCall(*tree_map(lambda it: _of_form(it) if isinstance(it, Tensor) else it, tuple(real)))
        layer = with_blank_weights(self.blocks.blank_layers[index], fake)
        if activations_offloaded:
            overwrite_activations(layer)
        if index not in self.loras:
            return lambda hidden: self.blocks.run(layer, hidden, call)
        lora = with_blank_weights(self.loras[index].requires_grad_(trained), fake)
        changes = {path: lora.get_submodule(path) for path in self.loras[index].paths}

        def run(hidden: Tensor) -> Tensor:
            with added(layer, changes):
                return self.blocks.run(layer, hidden, call)

        return run

    def head(self, fake: FakeTensorMode, batch: int, tokens: int) -> Callable[[Tensor], Tensor]:
        """Makes the head and its loss."""
        mask = padded(batch, tokens)
        if self.classes is None:
            slices, ids = _BlankSlices(self.blocks), np.zeros((batch, tokens), dtype=np.int64)
            every = np.ones((batch, tokens), dtype=bool)
            return lambda hidden: next_token_loss(self.blocks, hidden, ids, mask, every, slices)
        head = with_blank_weights(Head(self.blocks.hidden_size, self.classes, self.head_layers), fake)
        labels = torch.zeros(batch, dtype=torch.int64)
        below = torch.zeros(batch, self.head_layers - 1, self.blocks.hidden_size)
        with fake:
            mask, below, labels = map(_of_form, (mask, below, labels))
        return lambda hidden: cross_entropy(head(hidden, mask, below), labels, reduction="sum")

    def call_bytes(self, batch: int, tokens: int) -> int:
        """The bytes of what the model passes to its layers besides hidden states. Storage that layers share counts once."""
        leaves = tree_leaves(tuple(self._calls(batch, tokens)))
        storages = {
            leaf.untyped_storage()._cdata: leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)
        }
        return sum(storage.nbytes() for storage in storages.values())

    def _calls(self, batch: int, tokens: int) -> list[LayerCall]:
        """The calls of all layers. Each part is traced at the same few shapes, and the whole model runs to make them."""
        if (batch, tokens) not in self._known_calls:
            self._known_calls[batch, tokens] = self.blocks.calls(padded(batch, tokens))
        return self._known_calls[batch, tokens]


@dataclass(frozen=True)
class _BlankSlices:
    """Two slices of a language model's head, without values. Two are enough to show every allocation.

    They take no bytes here, because the profile counts the buffers of slices separately.
    """

    blocks: Blocks

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """See ``RowSlices``."""
        width = self.blocks.hidden_size
        rows = min(max(SLICE_BYTES // (width * self.blocks.dtype.itemsize), 1), self.blocks.vocabulary)
        for place in range(2):
            yield place * rows, torch.empty((), dtype=self.blocks.dtype).expand(rows, width)

    def numbers(self, name: str, first: int, count: int) -> Tensor:
        """See ``RowSlices``."""
        return torch.empty(count, dtype=self.blocks.dtype)


def padded(batch: int, tokens: int) -> Tensor:
    """A mask [B, T] whose first example is shorter: without any padding, some models need no mask and would not make one."""
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[0, tokens // 2 :] = 0
    return mask


def _of_form(tensor: Tensor) -> Tensor:
    """A tensor of the same form. To make a fake one of it, ``from_tensor`` would load torch's compiler."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
