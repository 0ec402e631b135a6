"""A part of a step, run with tensors that have shapes but no bytes, to learn how many bytes it will hold.

What a Hugging Face layer allocates is known to its own code alone. So that code is run, forward and backward, with fake
tensors, for which the operations are chosen that real ones on a CPU would have; a ledger keeps the bytes alive after each.
They are polynomials in the batch B and the tokens T, and a few small shapes determine them: from then on the planner
(planner.py) needs integers only.
"""

import copy
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

# Two batches and three lengths determine terms up to B·T². None is 1: what has one row is sometimes a view of another tensor.
_BATCHES, _TOKENS = (2, 3), (16, 32, 48)
SHAPES = tuple((batch, tokens) for batch in _BATCHES for tokens in _TOKENS)


class Prepare(Protocol):
    """Makes the weights of a part, as fake tensors, and gives what it does with hidden states [B, T, D]."""

    def __call__(self, fake: FakeTensorMode, batch: int, tokens: int) -> Callable[[Tensor], Tensor]: ...


def trace_memory(
    prepare: Prepare, width: int, dtype: torch.dtype, *, gradients: bool = True, activations_offloaded: bool = False
) -> PartMemory:
    """The bytes of a part for any B and T; activations that are offloaded count while they are read, and no longer."""
    runs = [_run(prepare, batch, tokens, width, dtype, gradients, activations_offloaded) for batch, tokens in SHAPES]
    return PartMemory(
        saved=_polynomial([run.saved for run in runs]) if gradients else NOTHING,
        forward=_moments([run.forward for run in runs]),
        backward=_moments([run.backward for run in runs]) if gradients else (),
    )


def with_blank_weights(module: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A copy of a module whose parameters have shapes but no bytes, and need gradients where the module's do."""
    made = copy.deepcopy(module)
    with fake:
        blank = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in made.state_dict().items()}
        made.load_state_dict(blank, assign=True)
    for parameter, original in zip(made.parameters(), module.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return made


@dataclass(frozen=True)
class _Run:
    """Bytes alive after each operation of a part; its input counts, and in backward the gradient of its output."""

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
        # Not a leaf: the graph would keep that alive by itself.
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
    """The rest of a step: keeps nothing of a part's output, and gives a gradient that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = output.shape, output.dtype
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        return torch.empty(ctx.shape, dtype=ctx.dtype)


class AllocationTrace(TorchDispatchMode):
    """Counts the bytes of every tensor that is made, until the last that shares them is gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = 0
        self._known: set[int] = set()
        self._history: list[int] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; torch would look whether it is, at every operation."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default:  # no operation, and asked more often than all of them
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
    """What ``Spill`` does, without a file."""

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
    """The polynomials of which the largest is the peak, whatever the shape."""
    if len({len(history) for history in histories}) > 1:
        # The part takes another path for another shape: what is left to compare is the peak.
        histories = [[max(history)] for history in histories]
    found = {_polynomial(moment) for moment in set(zip(*histories, strict=True))}
    return tuple(one for one in found if not any(_dominates(other, one) for other in found - {one}))


def _dominates(first: BytePolynomial, second: BytePolynomial) -> bool:
    """No factor of ``first`` is smaller."""
    pairs = (pair for rows in zip(first.terms, second.terms, strict=True) for pair in zip(*rows, strict=True))
    return all(one >= other for one, other in pairs)


def polynomial_of(count: Callable[[int, int], int]) -> BytePolynomial:
    """The polynomial of what ``count`` gives for B and T."""
    return _polynomial([count(batch, tokens) for batch, tokens in SHAPES])


def _polynomial(values: Sequence[int]) -> BytePolynomial:
    """The factors of BⁱTʲ, i ≤ 1 and j ≤ 2, from the values at ``SHAPES``; a fraction is rounded up."""
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
