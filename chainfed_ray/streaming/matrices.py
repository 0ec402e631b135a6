"""Streamed matrices: linear layers whose matrix is read slice by slice, and never in memory whole.

A frozen matrix is used once in a step's forward pass and once in its backward pass. Each time it is read again, a slice of rows
at a time, into two fixed buffers. While one slice is used, a thread fills the other buffer with the next slice: of the same
matrix, or of the matrix that followed it last time. So weights take the memory of two slices, however large the model is.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from chainfed_ray.streaming.checkpoint import Checkpoint

SLICE_BYTES = 4 * 2**20
_REMEMBERED = 2**14  # pairs of matrices whose successor is known; experts come in many orders


class _Piece(NamedTuple):
    """Rows ``first`` … ``first + rows - 1`` of the matrix called ``name``."""

    name: str
    first: int
    rows: int


class RowSlices(Protocol):
    """A source of matrix slices, such as ``SliceReader``."""

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The matrix's slices from the top: the index of the first row, and the rows [n, K].

        A slice is overwritten once the next one has been requested.
        """
        ...

    def numbers(self, name: str, first: int, count: int) -> Tensor:
        """``count`` elements of a vector from ``first`` on, [count]: the part of a bias that goes with a slice."""
        ...


class SliceReader:
    """Reads slices of a checkpoint's matrices in ``dtype``, each of at most ``slice_bytes``, or of one row if a row is larger.

    If the checkpoint has another dtype, ``slice_bytes`` include the slice in both dtypes. A quantized matrix has the slices of
    its float32 values, so that a sum over slices has the same bits. Only one matrix can be read at a time.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, slice_bytes: int = SLICE_BYTES) -> None:
        self._checkpoint, self._dtype, self._slice_bytes = checkpoint, dtype, slice_bytes
        self._buffers = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]
        self._filling = 0  # the buffer that was filled last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load-ahead")
        self._ahead: tuple[_Piece, Future[Tensor]] | None = None
        # Which matrix followed, by the two matrices before it. Two are needed to tell the forward pass from the backward pass.
        self._followed: dict[tuple[str, str], str] = {}
        self._before, self._present = "", ""

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """See ``RowSlices``. The slices need no gradient."""
        if len(self._followed) >= _REMEMBERED:
            self._followed.clear()
        self._followed[self._before, self._present] = name
        self._before, self._present = self._present, name
        pieces = self._pieces(name)
        for place, piece in enumerate(pieces):
            rows = self._take(piece)
            if place + 1 < len(pieces):
                self._load_ahead(pieces[place + 1])
            elif successor := self._followed.get((self._before, name)):
                self._load_ahead(self._pieces(successor)[0])
            yield piece.first, rows

    def numbers(self, name: str, first: int, count: int) -> Tensor:
        """See ``RowSlices``. The elements are read into new memory."""
        room = torch.empty(count * self._checkpoint.row_bytes(name), dtype=torch.uint8)
        return self._checkpoint.slice(name, first, count, room, self._dtype)

    def close(self) -> None:
        """Stop the thread and free the buffers."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead = None
        self._buffers.clear()

    def _pieces(self, name: str) -> list[_Piece]:
        count = self._checkpoint.shape(name)[0]
        step = rows_of_slice(self._checkpoint, name, self._dtype, self._slice_bytes)
        return [_Piece(name, first, min(step, count - first)) for first in range(0, count, step)]

    def _take(self, piece: _Piece) -> Tensor:
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == piece:
            return ahead[1].result()
        if ahead:
            ahead[1].result()  # the guess was wrong; wait, because its buffer is reused
        return self._load(piece, self._next_buffer())

    def _load_ahead(self, piece: _Piece) -> None:
        self._ahead = piece, self._thread.submit(self._load, piece, self._next_buffer())

    def _next_buffer(self) -> int:
        self._filling = 1 - self._filling
        return self._filling

    def _load(self, piece: _Piece, buffer: int) -> Tensor:
        used, stored = (piece.rows * size for size in _row_bytes(self._checkpoint, piece.name, self._dtype))
        room, stored_dtype = self._room(buffer, used + stored), self._checkpoint.dtype(piece.name)
        if not stored or self._checkpoint.form(piece.name):
            return self._checkpoint.slice(piece.name, piece.first, piece.rows, room, self._dtype)
        # The wider dtype comes first in the buffer, so that the narrower one is aligned.
        rows, source = (room[:used], room[used:]) if used > stored else (room[stored:], room[:stored])
        whole = self._checkpoint.slice(piece.name, piece.first, piece.rows, source, stored_dtype)
        return rows.view(self._dtype).view(whole.shape).copy_(whole)

    def _room(self, buffer: int, needed: int) -> Tensor:
        if len(self._buffers[buffer]) < needed:
            self._buffers[buffer] = torch.empty(max(needed, self._slice_bytes), dtype=torch.uint8)
        return self._buffers[buffer][:needed]


def rows_of_slice(checkpoint: Checkpoint, name: str, dtype: torch.dtype, slice_bytes: int = SLICE_BYTES) -> int:
    """The rows of a slice of the checkpoint's matrix ``name``, used in ``dtype``: one at least."""
    return max(slice_bytes // sum(_row_bytes(checkpoint, name, dtype)), 1)


def _row_bytes(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> tuple[int, int]:
    """The bytes of a matrix's row in ``dtype``, and in the checkpoint's dtype if that is another; otherwise 0."""
    stored, own = checkpoint.row_bytes(name), checkpoint.dtype(name)
    return (stored, 0) if own == dtype else (stored // own.itemsize * dtype.itemsize, stored)


class ResidentSlices(NamedTuple):
    """The slices of a ``matrix`` in memory, of ``rows`` rows each, as views."""

    matrix: Tensor
    rows: int

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """See ``RowSlices``. There is one matrix, whatever its name."""
        for first in range(0, len(self.matrix), self.rows):
            yield first, self.matrix[first : first + self.rows]

    def numbers(self, name: str, first: int, count: int) -> Tensor:
        """See ``RowSlices``."""
        return self.matrix[first : first + count]


class StreamedLinear(nn.Module):
    """A frozen linear layer whose matrix is streamed: [..., K] → [..., N].

    The matrix is [N, K], or [K, N] if ``transposed``, as GPT-2 stores it. The backward pass gives the gradient of the input
    only, and needs nothing from the forward pass.
    """

    bias: nn.Parameter | None

    def __init__(self, source: RowSlices, name: str, shape: tuple[int, int], bias: bool, transposed: bool) -> None:
        super().__init__()
        self.source, self.name, self.transposed = source, name, transposed
        self.outputs, self.inputs = (shape[1], shape[0]) if transposed else shape
        meta = torch.empty(self.outputs, device="meta")
        self.register_parameter("bias", nn.Parameter(meta, requires_grad=False) if bias else None)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        product: Tensor = _Product.apply(inputs, self)  # type: ignore[no-untyped-call]
        return product


def multiply(
    source: RowSlices, name: str, flat: Tensor, product: Tensor, by_columns: bool, bias: Tensor | None = None
) -> None:
    """Compute ``product`` = ``flat`` · matrixᵀ (+ ``bias``) if ``by_columns``, or else ``flat`` · matrix (+ ``bias``).

    The matrix, called ``name`` in ``source``, is read by slices of its rows. In the first case a slice gives some columns of
    ``product``; in the second it is multiplied with some columns of ``flat``.
    """
    for first, rows in source.slices(name):
        if by_columns:
            columns = product[:, first : first + len(rows)]
            if bias is None:
                torch.mm(flat, rows.T, out=columns)
            else:
                torch.addmm(bias[first : first + len(rows)], flat, rows.T, out=columns)
            continue
        columns = flat[:, first : first + len(rows)]
        if first > 0:
            product.addmm_(columns, rows)
        elif bias is None:
            torch.mm(columns, rows, out=product)
        else:
            torch.addmm(bias, columns, rows, out=product)


class _OnlyForm(Tensor):
    """Stands in the place of a streamed matrix. A family may look at its dtype, shape and device, but use no number of it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ not in ("__get__", "size", "dim"):
            raise RuntimeError(f"{function.__name__} of a matrix that is read from the checkpoint by slices")
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: StreamedLinear) -> Tensor:
        ctx.layer = layer
        return _multiplied(layer, inputs, layer.inputs, layer.outputs, backward=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer: StreamedLinear = ctx.layer
        return _multiplied(layer, gradients[0], layer.outputs, layer.inputs, backward=True), None


def _multiplied(layer: StreamedLinear, given: Tensor, width: int, wanted: int, backward: bool) -> Tensor:
    """[..., ``width``] → [..., ``wanted``]. The result is not a view, because the base model may change it in place."""
    result = given.new_empty(*given.shape[:-1], wanted)
    flat, bias = given.reshape(-1, width), None if backward else layer.bias
    multiply(layer.source, layer.name, flat, result.view(-1, wanted), layer.transposed == backward, bias)
    return result


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """True for a linear layer, whose matrix can be streamed; a subclass with a forward of its own is another kind of layer."""
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def stream_matrices(layer: nn.Module, prefix: str, source: RowSlices, names: "SourceNames") -> None:
    """Replace every linear layer in ``layer`` with a ``StreamedLinear``. ``prefix`` begins the names of the
    layer's parameters.
    """
    for path, module in list(layer.named_modules()):
        if is_linear(module):
            name = names(f"{prefix}{path}.weight")
            count, width = module.weight.shape
            streamed = StreamedLinear(source, name, (count, width), module.bias is not None, isinstance(module, Conv1D))
            if module.bias is not None:
                streamed.bias = nn.Parameter(torch.empty_like(module.bias, device="meta"), requires_grad=False)
            streamed.weight = torch.empty((), dtype=module.weight.dtype).expand(count, width).as_subclass(_OnlyForm)
            layer.set_submodule(path, streamed)


def slice_matrices(layer: nn.Module, rows_of: Callable[[str], int]) -> None:
    """Let every linear layer in ``layer`` use its matrix in slices of ``rows_of(path)`` rows, if it has more of them.

    The matrices are in memory. A sum over slices has other bits than a sum over all rows, and a client with less memory, whose
    matrices are streamed, must get the same ones.
    """
    for path, module in list(layer.named_modules()):
        if is_linear(module) and (rows := rows_of(path)) < len(module.weight):
            source, shape = ResidentSlices(module.weight, rows), (module.weight.shape[0], module.weight.shape[1])
            sliced = StreamedLinear(source, path, shape, False, isinstance(module, Conv1D))
            sliced.weight, sliced.bias = module.weight, module.bias
            layer.set_submodule(path, sliced)


class SourceNames(Protocol):
    """A function that gives the checkpoint's name for a parameter."""

    def __call__(self, name: str) -> str: ...
