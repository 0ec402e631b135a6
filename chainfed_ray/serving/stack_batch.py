"""Many finished stacks in one batch: each row goes through its own adapters and its own head, all rows in one product.

The rows' matrices are put side by side, [B, R, D] for a layer's adapters, and a batched product takes each row through its own.
Stacks may differ in their layers, bottlenecks, heads and classes. What a stack lacks counts as zeros, which change nothing: an
adapter of zeros is the identity, and a feature with the weight zero is not used.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from chainfed_ray.model.adapters import LORA_SCALE, Adapter, AdapterStack, Head, Lora, LowRank
from chainfed_ray.model.pooling import append_pooled

_ROWS_MORE = 4  # than there are, when room is made for them
Place = tuple[int, str]
"""A layer, and the path of a linear module inside it. An empty path stands for what follows the layer."""
RowAdapters = Mapping[Place, Callable[[Tensor], Tensor]]
"""Of the rows of one batch: what follows a layer, [B, T, D] → [B, T, D]; what a module gets added, [B, T, K] → [B, T, N]."""


def adapters_of(stacks: Sequence[AdapterStack | None]) -> RowAdapters:
    """The adapters of B rows: row i has those of ``stacks[i]``, or none."""
    rows = AdapterRows()
    for stack in stacks:
        rows.join(stack)
    return rows.adapters()


def _parts(stack: AdapterStack | None) -> dict[Place, Adapter | LowRank]:
    """The parts of a stack by their places."""
    parts = dict[Place, Adapter | LowRank]()
    for layer in stack.layers if stack else ():
        match stack.part(layer):  # type: ignore[union-attr]
            case Adapter() as adapter:
                parts[layer, ""] = adapter
            case Lora() as lora:
                parts |= {(layer, path): lora.part(path) for path in lora.paths}
    return parts


class RowStacks:
    """The adapters of B rows, whatever comes after them: row i has those of ``stacks[i]``, or none. No features are pooled."""

    def __init__(self, stacks: Sequence[AdapterStack | None]) -> None:
        self._stacks = stacks
        self.layers = tuple(sorted({layer for stack in stacks if stack for layer in stack.layers}))

    def after(self, layer: int) -> Callable[[Tensor], Tensor] | None:
        """The rows' adapters that follow ``layer``: [B, T, D] → [B, T, D]. If all have one stack, its own."""
        first = self._stacks[0]
        if first and all(stack is first for stack in self._stacks):
            return first.after(layer)
        parts = [stack.after(layer) if stack else None for stack in self._stacks]
        return _side_by_side(parts) if any(parts) else None

    def inside(self, layer: int) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """What the modules inside ``layer`` get added in each row, by their paths. If all rows have one stack, its own."""
        first = self._stacks[0]
        if first and all(stack is first for stack in self._stacks):
            return first.inside(layer)
        of_rows = [stack.inside(layer) if stack else {} for stack in self._stacks]
        return {
            path: _side_by_side([own.get(path) for own in of_rows])
            for path in {path for own in of_rows for path in own}
        }

    def pool(self, pooled: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """See ``Adapted``."""
        return pooled


def _side_by_side(parts: Sequence[Adapter | LowRank | None]) -> Callable[[Tensor], Tensor]:
    """What takes each row through its own part. At least one row has a part."""
    owns = [_matrices_of(part) for part in parts]
    if len({tuple(values.shape for values in own) for own in owns}) == 1:  # as is usual: a copy of each, and no zeros
        run, matrices = _run_of(parts[0]), [torch.stack(values) for values in zip(*owns, strict=True)]
        return lambda hidden: run(hidden, *matrices)
    rows = _PartRows(len(parts))
    for row, part in enumerate(parts):
        rows.put(row, part)
    return rows.first(len(parts))


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


def _adapted(hidden: Tensor, down: Tensor, into: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Rows [B, T, D] through adapters with the matrices [B, R, D] and [B, D, R], and the biases [B, 1, R] and [B, 1, D]."""
    inner = nn.functional.gelu(torch.baddbmm(into, hidden.to(down.dtype), down.transpose(1, 2)))
    return hidden + torch.baddbmm(out, inner, up.transpose(1, 2)).to(hidden.dtype)


def _low_rank(inputs: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Rows [B, T, K] through LoRAs with the matrices [B, r, K] and [B, N, r]. Some families hand over [B · T, K]."""
    rows = inputs.reshape(len(first), -1, inputs.shape[-1]).to(first.dtype)
    changes = torch.bmm(torch.bmm(rows, first.transpose(1, 2)), second.transpose(1, 2)) * LORA_SCALE
    return changes.reshape(*inputs.shape[:-1], changes.shape[-1]).to(inputs.dtype)


class AdapterRows:
    """The adapters of rows that come and go, side by side: a row that joins or leaves costs a copy of one stack, not of all.

    The rows are 0 … count - 1, without gaps: where one leaves, the last one takes its place.
    """

    def __init__(self) -> None:
        self._stacks = list[AdapterStack | None]()
        self._places: dict[Place, _PartRows] = {}

    def join(self, stack: AdapterStack | None) -> None:
        """Add a row at the end."""
        self._stacks.append(stack)
        self._put(len(self._stacks) - 1, stack)

    def leave(self, row: int) -> None:
        """Let the last row take the place of ``row``."""
        last = self._stacks.pop()
        if row < len(self._stacks):
            self._stacks[row] = last
            self._put(row, last)

    def adapters(self) -> RowAdapters:
        """The adapters of all rows. If they have the same stack, its own, which is faster."""
        first, count = self._stacks[0], len(self._stacks)
        if all(stack is first for stack in self._stacks):
            return _parts(first)
        return {place: rows.first(count) for place, rows in self._places.items()}

    def _put(self, row: int, stack: AdapterStack | None) -> None:
        parts = _parts(stack)
        for place in parts:
            self._places.setdefault(place, _PartRows())
        for place, rows in self._places.items():
            rows.put(row, parts.get(place))


class _PartRows:
    """The matrices of one part of the stacks, a row each. A row without the part has zeros, which change nothing."""

    def __init__(self, expected: int = 0) -> None:
        self._expected = expected  # rows, as far as that is known
        self._run: Callable[..., Tensor] = _adapted
        self._matrices: tuple[Tensor, ...] | None = None

    def put(self, row: int, part: Adapter | LowRank | None) -> None:
        if part is None and self._matrices is None:
            return
        own = _matrices_of(part)
        self._make_room(row, own)
        assert self._matrices is not None
        for matrix in self._matrices:
            matrix[row] = 0
        if part is not None:
            self._run = _run_of(part)
            for matrix, values in zip(self._matrices, own, strict=True):
                matrix[row, : values.shape[0], : values.shape[1]] = values  # another stack may be wider

    def first(self, count: int) -> Callable[[Tensor], Tensor]:
        """The parts of the first ``count`` rows."""
        assert self._matrices is not None, "the place of some row's part"
        run, matrices = self._run, [matrix[:count] for matrix in self._matrices]
        return lambda hidden: run(hidden, *matrices)

    def _make_room(self, row: int, own: tuple[Tensor, ...]) -> None:
        """Make the matrices, or larger ones, so that they have ``row`` and are as wide as a row's ``own``."""
        held = self._matrices or tuple(values.new_zeros(0, *values.shape) for values in own)
        rows, needed = len(held[0]), own or tuple(matrix[0] for matrix in held)
        shapes = [tuple(map(max, matrix.shape[1:], of.shape)) for matrix, of in zip(held, needed, strict=True)]
        if row < rows and all(shape == matrix.shape[1:] for shape, matrix in zip(shapes, held, strict=True)):
            return
        rows = rows if row < rows else max(self._expected, row + _ROWS_MORE)
        self._matrices = tuple(matrix.new_zeros(rows, *shape) for matrix, shape in zip(held, shapes, strict=True))
        for new, old in zip(self._matrices, held, strict=True):
            new[tuple(slice(size) for size in old.shape)] = old


def _run_of(part: Adapter | LowRank | None) -> Callable[..., Tensor]:
    """What takes rows through parts of this kind."""
    return _adapted if isinstance(part, Adapter) else _low_rank


def _matrices_of(part: Adapter | LowRank | None) -> tuple[Tensor, ...]:
    """The matrices of a part, in the order in which its function takes them."""
    match part:
        case Adapter(down=down, up=up):
            return down.weight.data, down.bias.data.unsqueeze(0), up.weight.data, up.bias.data.unsqueeze(0)
        case LowRank(lora_A=first, lora_B=second):
            return first.weight.data, second.weight.data
        case _:
            return ()
