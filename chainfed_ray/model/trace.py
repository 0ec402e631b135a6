"""Traces the memory of a part of a training step, without allocating it.

Only a Hugging Face layer's own code knows what it allocates. So that code is run forward and backward on fake tensors, which
have shapes but no bytes, with the operations that a CPU would choose for real ones. A ledger keeps the bytes alive after each
operation. These bytes are polynomials in the batch B and the tokens T, and traces at a few small shapes determine them: from
then on the planner (``planner.py``) needs integers only.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # it has no public name; the version of torch is pinned
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chainfed_ray.budget.demand import NOTHING, BytePolynomial, PartMemory
from chainfed_ray.streaming.activations import is_offloaded
from chainfed_ray.streaming.blank_model import copy_of

# Two batches and three lengths determine terms up to B·T². No batch is 1, where tensors are sometimes views instead of copies.
_BATCHES, _TOKENS = (2, 3), (16, 32, 48)
SHAPES = tuple((batch, tokens) for batch in _BATCHES for tokens in _TOKENS)


class Prepare(Protocol):
    """Makes a part with fake weights. The result is the part's function of hidden states [B, T, D]."""

    def __call__(self, fake: FakeTensorMode, batch: int, tokens: int) -> Callable[[Tensor], Tensor]: ...


def trace_memory(
    prepare: Prepare, width: int, dtype: torch.dtype, *, gradients: bool = True, activations_offloaded: bool = False
) -> PartMemory:
    """The bytes of a part for any B and T, for hidden states of width D = ``width``.

    Activations that are offloaded count only while they are in use. Without ``gradients`` there is no backward pass.
    """
    runs = [_run(prepare, batch, tokens, width, dtype, gradients, activations_offloaded) for batch, tokens in SHAPES]
    return PartMemory(
        saved=_polynomial([run.saved for run in runs]) if gradients else NOTHING,
        forward=_moments([run.forward for run in runs]),
        backward=_moments([run.backward for run in runs]) if gradients else (),
    )


def with_blank_weights(module: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A copy of a module with fake parameters, which need gradients where the module's do."""
    made = copy_of(module)
    forms = module.state_dict()
    with fake:
        blank = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in forms.items()}
        made.load_state_dict(blank, assign=True)
    for parameter, original in zip(made.parameters(), module.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return made


@dataclass(frozen=True)
class _Run:
    """The bytes alive after each operation of a part, with its input and, in the backward pass, its output's gradient."""

    forward: list[int]
    saved: int
    backward: list[int]


def _run(
    prepare: Prepare,
    batch: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    gradients: bool,
    activations_offloaded: bool,
) -> _Run:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    compute = prepare(fake, batch, tokens)
    with fake, AllocationTrace() as ledger, torch.set_grad_enabled(gradients):
        # The input must not be a leaf, because the autograd graph would keep a leaf alive.
        seed = torch.zeros((), dtype=dtype, requires_grad=gradients)
        hidden = seed.expand(batch, tokens, width).clone()
        ledger.history()
        with DiscardedActivations() if activations_offloaded else nullcontext():
            output = compute(hidden)
        del hidden
        forward = ledger.history()
        if not gradients:
            return _Run(forward, 0, [])
        rest: Tensor = RestOfStep.apply(output)  # type: ignore[no-untyped-call]
        del output
        saved = ledger.alive
        ledger.history()
        rest.backward()  # type: ignore[no-untyped-call]
        return _Run(forward, saved, ledger.history())


class RestOfStep(torch.autograd.Function):
    """Takes the place of the rest of a step. It keeps nothing of the part's output, and makes a gradient that nothing else
    holds.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = output.shape, output.dtype
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        return torch.empty(ctx.shape, dtype=ctx.dtype)


class AllocationTrace(TorchDispatchMode):
    """Counts the bytes of every storage that is allocated, until the last tensor that uses it is gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = 0
        self._known: set[int] = set()
        self._history: list[int] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps torch from checking for compilation at every operation; nothing is compiled here."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default:  # a query, not an operation, and the most frequent call
            return args[0].fake_device
        given = {_identity(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _identity(tensor) not in given | self._known:
                self._count(tensor.untyped_storage())
        self._history.append(self.alive)
        return result

    def history(self) -> list[int]:
        """The bytes alive after each operation since the last call."""
        history, self._history = self._history, []
        return history

    def _count(self, storage: Any) -> None:
        self._known.add(storage._cdata)
        self.alive += storage.nbytes()
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.alive -= size


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class DiscardedActivations(saved_tensors_hooks):
    """Does what ``OffloadedActivations`` does, without a file."""

    def __init__(self) -> None:
        super().__init__(self._put, self._get)  # type: ignore[no-untyped-call]

    @staticmethod
    def _put(tensor: Tensor) -> Any:
        if not is_offloaded(tensor):
            return tensor
        tensor.contiguous()
        return tensor.shape, tensor.dtype

    @staticmethod
    def _get(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1])


def _moments(histories: Sequence[list[int]]) -> tuple[BytePolynomial, ...]:
    """The polynomials whose maximum is the peak, for any shape."""
    if len({len(history) for history in histories}) > 1:
        # The part runs other operations for other shapes, so only the peaks can be compared.
        histories = [[max(history)] for history in histories]
    found = {_polynomial(moment) for moment in set(zip(*histories, strict=True))}
    return tuple(one for one in found if not any(_dominates(other, one) for other in found - {one}))


def _dominates(first: BytePolynomial, second: BytePolynomial) -> bool:
    """True if no factor of ``first`` is smaller."""
    pairs = (pair for rows in zip(first.terms, second.terms, strict=True) for pair in zip(*rows, strict=True))
    return all(one >= other for one, other in pairs)


def polynomial_of(count: Callable[[int, int], int]) -> BytePolynomial:
    """The polynomial with the values of ``count`` (B, T)."""
    return _polynomial([count(batch, tokens) for batch, tokens in SHAPES])


def _polynomial(values: Sequence[int]) -> BytePolynomial:
    """The polynomial with terms BⁱTʲ, i ≤ 1 and j ≤ 2, that has ``values`` at ``SHAPES``; fractional factors are rounded up."""
    lower, higher = (_quadratic(values[start : start + len(_TOKENS)]) for start in (0, len(_TOKENS)))
    slope = [(high - low) / (_BATCHES[1] - _BATCHES[0]) for low, high in zip(lower, higher, strict=True)]
    constant = [low - _BATCHES[0] * rise for low, rise in zip(lower, slope, strict=True)]
    return BytePolynomial((tuple(ceil(factor) for factor in constant), tuple(ceil(factor) for factor in slope)))


def _quadratic(values: Sequence[int]) -> tuple[Fraction, Fraction, Fraction]:
    """The factors of 1, T and T² through three values at ``_TOKENS`` (Newton's divided differences)."""
    (first, second, third), (low, middle, high) = values, _TOKENS
    rise = Fraction(second - first, middle - low)
    bend = (Fraction(third - second, high - middle) - rise) / (high - low)
    return first - rise * low + bend * low * middle, rise - bend * (low + middle), bend
