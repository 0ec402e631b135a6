"""The memory profile of a base model: the bytes of each part of a turn, as functions of the examples and tokens in a batch.

``model/costs.py`` makes a profile once, by tracing the model's parts without real tensors (``model/trace.py``). The planner
(``planner.py``) then needs integer arithmetic only.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest


@dataclass(frozen=True)
class BytePolynomial:
    """Bytes for B examples of T tokens: a sum of terms BⁱTʲ, whose factors are ``terms[i][j]``."""

    terms: tuple[tuple[int, ...], ...]

    def at(self, batch: int, tokens: int) -> int:
        """The bytes for ``batch`` examples of ``tokens`` tokens."""
        return sum(factor * batch**i * tokens**j for i, row in enumerate(self.terms) for j, factor in enumerate(row))

    def __add__(self, other: "BytePolynomial") -> "BytePolynomial":
        pairs = zip_longest(self.terms, other.terms, fillvalue=())
        return BytePolynomial(tuple(tuple(map(sum, zip_longest(*pair, fillvalue=0))) for pair in pairs))


NOTHING = BytePolynomial(())


@dataclass(frozen=True)
class PartMemory:
    """The bytes of one part of a training step: in its forward pass, in its backward pass, and saved between the two.

    The forward bytes include the part's input and output. The backward bytes include the gradients of both, and what was saved.
    Each has several polynomials, one for each moment that may be the peak: which of them is the largest depends on the batch's
    shape.
    """

    saved: BytePolynomial
    forward: tuple[BytePolynomial, ...]
    backward: tuple[BytePolynomial, ...]

    def forward_at(self, batch: int, tokens: int) -> int:
        """The peak in bytes during the forward pass."""
        return max((moment.at(batch, tokens) for moment in self.forward), default=0)

    def backward_at(self, batch: int, tokens: int) -> int:
        """The peak in bytes during the backward pass."""
        return max((moment.at(batch, tokens) for moment in self.backward), default=0)


NO_MEMORY = PartMemory(NOTHING, (), ())


def largest_of(parts: list[PartMemory]) -> PartMemory:
    """The memory of a part that is one of ``parts``: at no moment less than any of them."""
    factors = zip(*(part.saved.terms for part in parts), strict=True)
    return PartMemory(
        saved=BytePolynomial(tuple(tuple(map(max, zip(*rows, strict=True))) for rows in factors)),
        forward=tuple(dict.fromkeys(moment for part in parts for moment in part.forward)),
        backward=tuple(dict.fromkeys(moment for part in parts for moment in part.backward)),
    )


@dataclass(frozen=True)
class StepMemory:
    """The parts of a training step. With adapters ``inside`` their layers, ``adapter`` is a layer with one that is trained."""

    adapter: PartMemory  # an adapter that is trained
    layer: PartMemory  # with a frozen adapter, if that is inside it
    head: PartMemory  # the head and the loss
    emulator: PartMemory  # a frozen adapter above the window, in place of its layer on the global branch


@dataclass(frozen=True)
class MemoryProfile:
    """What the planner needs to know of a base model and its stack. In bytes, unless a comment says otherwise."""

    layers: int  # L, the number of layers
    hidden: int  # D, the hidden width
    itemsize: int  # one element of an activation
    layer: int  # the weights of the largest layer
    unstreamed: int  # the layer's norms and biases: they stay resident when its matrices are streamed
    slices: int  # the buffers for streamed matrices
    conversion: int  # the largest parameter in the checkpoint's dtype, held while it is converted
    skeleton: int  # the model's modules without weights, and compiled operations
    call: BytePolynomial  # what every layer is called with besides hidden states: masks, rotary tables
    adapter: int
    head: int
    head_layers: int  # the number of layers whose pooled features the head uses
    streamed_head: bool  # True for a language model's own head: never resident, not trained
    inside: bool  # True if adapters are inside their layers: a step begins at the input of the window's bottom layer
    kept: StepMemory  # a step with its saved activations in memory
    activations_offloaded: StepMemory  # a step with its saved activations on disk
    advance: PartMemory  # a layer without gradients, as the prefix is run
    advance_adapter: PartMemory  # an adapter without gradients

    @cached_property
    def recomputed(self) -> PartMemory:
        """A layer with its adapter, whose activations are computed again in the backward pass: its input alone is saved."""
        states = BytePolynomial(((0, 0), (0, self.hidden * self.itemsize)))  # [B, T, D]: the input, or a gradient of it
        layer, adapter = self.kept.layer, self.kept.adapter
        if self.inside:
            again, back = _beside(states, adapter.forward), _beside(states, adapter.backward)
            return PartMemory(saved=states, forward=self.advance.forward, backward=(*again, *back))
        forward = [*self.advance.forward, *_beside(states, self.advance_adapter.forward)]
        # First the forward pass again, beside the gradient that came; then the backward pass, beside the input.
        again = _beside(states, [*layer.forward, *_beside(layer.saved, adapter.forward)])
        back = _beside(states, [*layer.backward, *_beside(layer.saved, adapter.backward)])
        return PartMemory(saved=states, forward=tuple(forward), backward=(*again, *back))


def _beside(held: BytePolynomial, moments: Iterable[BytePolynomial]) -> list[BytePolynomial]:
    """``moments`` while ``held`` bytes are alive as well."""
    return [held + moment for moment in moments]
