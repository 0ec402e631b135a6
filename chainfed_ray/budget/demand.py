"""What each part of a turn takes, as the planner adds it up: bytes that depend on examples and tokens, for one base model.

They are rehearsed once (costs.py, trace.py); from then on there is integer arithmetic only (planner.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class BytePolynomial:
    """Bytes for B examples of T tokens: a sum of terms BⁱTʲ, with ``terms[i][j]`` their factors."""

    terms: tuple[tuple[int, ...], ...]

    def at(self, batch: int, tokens: int) -> int:
        """The bytes for a batch."""
        return sum(factor * batch**i * tokens**j for i, row in enumerate(self.terms) for j, factor in enumerate(row))


NOTHING = BytePolynomial(())


@dataclass(frozen=True)
class PartMemory:
    """The bytes of one part of a step: alive during its forward and its backward pass, and saved from one to the other.

    Forward counts the part's input and output; backward the gradients of both and what was saved. Each is the largest of
    several sums, since which moment is the highest depends on the shape.
    """

    saved: BytePolynomial
    forward: tuple[BytePolynomial, ...]
    backward: tuple[BytePolynomial, ...]

    def forward_at(self, batch: int, tokens: int) -> int:
        """The most that is alive on the way forward."""
        return max((moment.at(batch, tokens) for moment in self.forward), default=0)

    def backward_at(self, batch: int, tokens: int) -> int:
        """The most that is alive on the way back."""
        return max((moment.at(batch, tokens) for moment in self.backward), default=0)


@dataclass(frozen=True)
class StepMemory:
    """The parts of a training step."""

    adapter: PartMemory  # one that is trained
    layer: PartMemory
    head: PartMemory  # with the loss
    emulator: PartMemory  # an adapter above the window, on the global branch


@dataclass(frozen=True)
class MemoryProfile:
    """What the arithmetic needs to know of a base model and its stack. Bytes, unless said otherwise."""

    layers: int  # L, a count
    hidden: int  # D, a count
    itemsize: int  # of an activation's element
    layer: int  # the largest layer's weights
    unstreamed: int  # of those, what is no matrix: norms and biases
    slices: int  # the buffers of streamed matrices
    conversion: int  # a tensor as it is kept, while it becomes one of another dtype
    skeleton: int  # the model without its weights, and compiled operations
    call: BytePolynomial  # masks and rotary tables
    adapter: int
    head: int
    head_layers: int  # layers that the head reads, a count
    streamed_head: bool  # the language model's own head: never resident, and not trained
    kept: StepMemory  # saved activations in memory
    activations_offloaded: StepMemory  # … on disk
    advance: PartMemory  # a layer without gradients
    advance_adapter: PartMemory
