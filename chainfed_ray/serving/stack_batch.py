"""Many finished stacks in one batch: each row goes through its own adapters and its own head, all rows in one product.

The rows' matrices are put side by side, [B, R, D] for a layer's adapters, and a batched product takes each row through its own.
Stacks may differ in their layers, bottlenecks, heads and classes. What a stack lacks counts as zeros, which change nothing: an
adapter of zeros is the identity, and a feature with the weight zero is not used.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from chainfed_ray.model.adapters import Adapter, AdapterStack, Head
from chainfed_ray.model.pooling import append_pooled

_ROWS_MORE = 4  # than there are, when room is made for them
RowAdapters = Mapping[int, Callable[[Tensor], Tensor]]
"""What follows each layer of that index, for the rows of one batch: [B, T, D] → [B, T, D]."""


def adapters_of(stacks: Sequence[AdapterStack | None]) -> RowAdapters:
    """The adapters of B rows: row i has those of ``stacks[i]``, or none."""
    rows = RowStacks(stacks)
    return {layer: rows.adapter(layer) for layer in rows.layers}


class RowStacks:
    """The adapters of B rows, whatever comes after them: row i has those of ``stacks[i]``, or none. No features are pooled."""

    def __init__(self, stacks: Sequence[AdapterStack | None]) -> None:
        self._stacks = stacks
        self.layers = tuple(sorted({layer for stack in stacks if stack for layer in stack.layers}))

    def adapter(self, layer: int) -> Callable[[Tensor], Tensor]:
        """The rows' adapters that follow ``layer``: [B, T, D] → [B, T, D]. If all have one stack, its own."""
        first = self._stacks[0]
        if first and all(stack is first for stack in self._stacks):
            return first.adapter(layer)
        rows = _LayerRows(len(self._stacks))
        for row, stack in enumerate(self._stacks):
            rows.put(row, _adapter(stack, layer))
        return rows.first(len(self._stacks))

    def pool(self, pooled: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """See ``Adapted``."""
        return pooled


class StackBatch(RowStacks):
    """The classifiers' stacks of B rows: row i has the adapters and the head of ``stacks[i]``."""

    def __init__(self, stacks: Sequence[AdapterStack]) -> None:
        super().__init__(stacks)
        self._heads = [_head_of(stack) for stack in stacks]
        self._pooled_layers = max(stack.pooled_layers for stack in stacks)

    def pool(self, pooled: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """The pooled features for the next layer up, as many as the widest head uses. See ``AdapterStack.pool``."""
        return append_pooled(pooled, hidden, mask, self._pooled_layers)

    def head(self, hidden: Tensor, mask: Tensor, pooled: Tensor) -> Tensor:
        """Hidden states [B, T, D], mask [B, T] and pooled features [B, r, D] → logits [B, C].

        C is the number of classes of the stack that has most. What stands beyond a row's own classes has no meaning.
        """
        features = append_pooled(pooled, hidden, mask, self._pooled_layers + 1)
        norms = [head.norm for head in self._heads]
        normed = nn.functional.layer_norm(features, features.shape[-1:], eps=norms[0].eps)
        scale, shift = (torch.stack([getattr(norm, name) for norm in norms]) for name in ("weight", "bias"))
        normed = (normed * scale.unsqueeze(1) + shift.unsqueeze(1)).flatten(1)

        classes = max(head.linear.out_features for head in self._heads)
        weights, biases = (
            normed.new_zeros(len(normed), classes, normed.shape[1]),
            normed.new_zeros(len(normed), classes),
        )
        for row, head in enumerate(self._heads):
            own = head.linear.weight[:, -normed.shape[1] :]  # where there are fewer layers than it can use, the highest
            weights[row, : len(own), -own.shape[1] :] = own
            biases[row, : len(own)] = head.linear.bias
        return torch.baddbmm(biases.unsqueeze(2), weights, normed.unsqueeze(2)).squeeze(2)


def _head_of(stack: AdapterStack) -> Head:
    assert stack.head is not None, "a classifier's stack has a head"
    return stack.head


def _adapter(stack: AdapterStack | None, layer: int) -> Adapter | None:
    return stack.adapter(layer) if stack and layer in stack.layers else None


def _adapted(hidden: Tensor, down: Tensor, into: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Rows [B, T, D] through adapters with the matrices [B, R, D] and [B, D, R], and the biases [B, 1, R] and [B, 1, D]."""
    inner = nn.functional.gelu(torch.baddbmm(into, hidden.to(down.dtype), down.transpose(1, 2)))
    return hidden + torch.baddbmm(out, inner, up.transpose(1, 2)).to(hidden.dtype)


class AdapterRows:
    """The adapters of rows that come and go, side by side: a row that joins or leaves costs a copy of one stack, not of all.

    The rows are 0 … count - 1, without gaps: where one leaves, the last one takes its place.
    """

    def __init__(self) -> None:
        self._stacks = list[AdapterStack | None]()
        self._layers: dict[int, _LayerRows] = {}

    def join(self, stack: AdapterStack | None) -> None:
        """Add a row at the end."""
        row = len(self._stacks)
        self._stacks.append(stack)
        for layer in stack.layers if stack else ():
            self._layers.setdefault(layer, _LayerRows())
        for layer, rows in self._layers.items():
            rows.put(row, _adapter(stack, layer))

    def leave(self, row: int) -> None:
        """Let the last row take the place of ``row``."""
        last = self._stacks.pop()
        if row == len(self._stacks):
            return
        self._stacks[row] = last
        for layer, rows in self._layers.items():
            rows.put(row, _adapter(last, layer))

    def adapters(self) -> RowAdapters:
        """The adapters of all rows. If they have the same stack, its own, which is faster."""
        if all(stack is self._stacks[0] for stack in self._stacks):
            return adapters_of(self._stacks[:1])
        count = len(self._stacks)
        return {layer: rows.first(count) for layer, rows in self._layers.items()}


class _LayerRows:
    """The matrices of one layer's adapters, a row each. Rows without an adapter are zeros: the identity."""

    def __init__(self, expected: int = 0) -> None:
        self._expected = expected  # rows, as far as that is known
        self._matrices: tuple[Tensor, ...] | None = None

    def put(self, row: int, adapter: Adapter | None) -> None:
        if adapter is None and self._matrices is None:
            return
        self._make_room(row, adapter)
        assert self._matrices is not None
        for matrix in self._matrices:
            matrix[row] = 0
        if adapter is not None:
            down, into, up, out = self._matrices
            own = adapter.down.out_features
            down[row, :own], into[row, 0, :own] = adapter.down.weight, adapter.down.bias
            up[row, :, :own], out[row, 0] = adapter.up.weight, adapter.up.bias

    def first(self, count: int) -> Callable[[Tensor], Tensor]:
        """The adapters of the first ``count`` rows."""
        assert self._matrices is not None, "the layer of some row's adapter"
        down, into, up, out = (matrix[:count] for matrix in self._matrices)
        return lambda hidden: _adapted(hidden, down, into, up, out)

    def _make_room(self, row: int, adapter: Adapter | None) -> None:
        """Make the matrices, or larger ones, so that they have ``row`` and are as wide as ``adapter``."""
        held = self._matrices
        rows, bottleneck = (held[0].shape[0], held[0].shape[1]) if held else (0, 0)
        wanted = max(bottleneck, adapter.down.out_features if adapter else 0)
        if row < rows and wanted == bottleneck:
            return
        like = held[0] if held else adapter.down.weight if adapter else None
        assert like is not None
        width, rows = like.shape[-1], rows if row < rows else max(self._expected, row + _ROWS_MORE)
        shapes = ((rows, wanted, width), (rows, 1, wanted), (rows, width, wanted), (rows, 1, width))
        self._matrices = tuple(like.new_zeros(shape) for shape in shapes)
        for new, old in zip(self._matrices, held or (), strict=False):
            new[tuple(slice(size) for size in old.shape)] = old
