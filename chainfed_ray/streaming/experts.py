"""Mixtures of experts: each token passes through a few of a layer's experts, and only their matrices are used.

Transformers keeps the matrices of all experts as one parameter [E, N, K], and lets a function of the caller's run them. The one
here sorts the pairs of a token and an expert by expert, and multiplies the rows of each expert with its matrix. So the shapes
depend on the number of tokens alone, and memory can be planned. Streamed, the matrices of an expert that no token is sent to
are not read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # it has no public name; the version of torch is pinned

from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.matrices import ResidentSlices, RowSlices, SourceNames, multiply

_NAME = "chainfed"  # of our function among transformers' own
_MATRICES = ("gate_up_proj", "up_proj", "down_proj")


def run_experts(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Tokens [N, D], the experts ``chosen`` for each [N, k] and their ``weights`` [N, k] → [N, D]."""
    count = chosen.shape[-1]
    expert_of, order = chosen.reshape(-1).sort()
    rows = _rows_by_expert(expert_of, experts.num_experts)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _product(experts, first, hidden[order // count], expert_of, rows)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    outer = _product(experts, "down_proj", inner, expert_of, rows)
    if experts.has_post_expert_norm:
        outer = experts.post_expert_norm(outer)
    weighted = outer * weights.reshape(-1)[order, None]
    return weighted[order.argsort()].view(len(hidden), count, -1).sum(1).to(hidden.dtype)


def registered() -> str:
    """Register ``run_experts`` among transformers' own functions; its name there, for ``experts_implementation``."""
    from transformers.integrations.moe import (
        ALL_EXPERTS_FUNCTIONS,  # it imports all that a model does: see lean_imports.py
    )

    ALL_EXPERTS_FUNCTIONS.register(_NAME, run_experts)
    return _NAME


def expert_matrices(module: nn.Module) -> list[str]:
    """The names of a module's parameters [E, …] that are the matrices of experts; none if it is no module of experts."""
    if not hasattr(module, "has_post_expert_norm"):  # transformers' modules of experts have it
        return []
    return [name for name in _MATRICES if isinstance(getattr(module, name, None), nn.Parameter)]


class _Resident(NamedTuple):
    """The matrices [E, …] of all experts, in memory. Each is used in slices of ``rows`` rows, as if it were streamed."""

    tensor: Tensor
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return tuple(self.tensor.shape)

    def multiply(self, expert: int, flat: Tensor, product: Tensor, by_columns: bool) -> None:
        """See ``matrices.multiply``, for the matrix of one expert."""
        multiply(ResidentSlices(self.tensor[expert], self.rows), "", flat, product, by_columns)


class StreamedExperts(NamedTuple):
    """The matrices [E, …] of all experts, called ``name`` in a checkpoint; those of one expert are read when they are used."""

    source: RowSlices
    checkpoint: Checkpoint
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.checkpoint.shape(self.name)

    def multiply(self, expert: int, flat: Tensor, product: Tensor, by_columns: bool) -> None:
        """See ``matrices.multiply``, for the matrix of one expert."""
        multiply(self.source, self.checkpoint.matrix(self.name, expert), flat, product, by_columns)


def stream_experts(
    layer: nn.Module, prefix: str, source: RowSlices, checkpoint: Checkpoint, names: SourceNames
) -> None:
    """Let the matrices of a layer's experts be read from ``source``. ``prefix`` begins the names of the layer's parameters."""
    for path, module in layer.named_modules():
        for matrices in expert_matrices(module):
            delattr(module, matrices)
            setattr(module, matrices, StreamedExperts(source, checkpoint, names(f"{prefix}{path}.{matrices}")))


def slice_experts(layer: nn.Module, rows_of: Callable[[str], int]) -> None:
    """Let the matrices of a layer's experts, which are in memory, be used in slices of ``rows_of(path)`` rows.

    See ``matrices.slice_matrices``.
    """
    for path, module in layer.named_modules():
        for matrices in expert_matrices(module):
            setattr(module, f"{matrices}_slice", rows_of(f"{path}.{matrices}"))


def _product(experts: Any, name: str, inputs: Tensor, expert_of: Tensor, rows: list[int]) -> Tensor:
    """The product of each row [S, K] with the matrix of its expert, and the expert's bias if there is one: [S, N]."""
    given = getattr(experts, name)
    if isinstance(given, Tensor):
        given = _Resident(given, getattr(experts, f"{name}_slice", given.shape[1]))
    width = given.shape[-1 if experts.is_transposed else -2]
    product: Tensor = _Grouped.apply(inputs, given, rows, width, experts.is_transposed)  # type: ignore[no-untyped-call]
    return product.add_(getattr(experts, f"{name}_bias")[expert_of]) if experts.has_bias else product


class _Grouped(torch.autograd.Function):
    """[S, K] → [S, N]: the first ``rows[0]`` rows by the matrix of expert 0, and so on.

    A matrix is [N, K], or [K, N] if it is ``transposed``. The backward pass gives the gradient of the input only.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, matrices: Any, rows: list[int], width: int, transposed: bool) -> Tensor:
        ctx.matrices, ctx.rows, ctx.width, ctx.transposed = matrices, rows, inputs.shape[1], transposed
        return _by_expert(inputs, matrices, rows, width, not transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _by_expert(gradients[0], ctx.matrices, ctx.rows, ctx.width, ctx.transposed), None, None, None, None


def _by_expert(given: Tensor, matrices: Any, rows: list[int], width: int, by_columns: bool) -> Tensor:
    """[S, …] → [S, ``width``]."""
    products, first = given.new_empty(len(given), width), 0
    for expert, count in enumerate(rows):
        if count:
            matrices.multiply(expert, given[first : first + count], products[first : first + count], by_columns)
        first += count
    return products


def _rows_by_expert(expert_of: Tensor, experts: int) -> list[int]:
    """How many rows each expert gets. Tensors without values are sent to the first expert: the memory is the same."""
    if expert_of.is_meta or isinstance(expert_of, FakeTensor):
        return [len(expert_of)] + [0] * (experts - 1)
    counts: list[int] = expert_of.bincount(minlength=experts).tolist()
    return counts
