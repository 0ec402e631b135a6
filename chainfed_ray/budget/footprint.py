"""The bytes that a training step holds at its peak.

They follow from the order of its parts (adapters, layers, head, emulators): in the forward pass each part leaves what it saved
for the backward pass. ``MemoryProfile`` (``demand.py``) has the bytes of each part.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from chainfed_ray.budget.demand import MemoryProfile, PartMemory
from chainfed_ray.chain import Window

# How a layer's weights are loaded: ``resident`` keeps whole layers while they are used, ``streamed`` reads one matrix at a
# time, slice by slice.
WeightPlacement = Literal["resident", "streamed"]
# What becomes of the activations that a layer saves for its backward pass: they are ``kept`` in memory; ``recomputed`` from the
# layer's input, which alone is kept, one layer at a time; or ``offloaded`` to disk.
SavedActivations = Literal["kept", "recomputed", "offloaded"]

# Measured, because arithmetic cannot know it: what libraries allocate besides tensors, and what the interpreter keeps.
RUNTIME = 6 * 2**20
ADAM_STATES = 2
FLOAT32 = 4


@dataclass(frozen=True)
class Footprint:
    """The bytes of a training step at its peak, by part."""

    layer_weights: int
    buffers: int  # slices of streamed matrices
    adapters: int
    head: int
    gradients: int
    optimizer: int
    cache_pages: int  # the batch read from the prefix cache; the cache itself is never mapped
    saved_activations: int
    transients: int
    runtime: int  # the model's modules without weights, and what libraries and the interpreter keep

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The bytes of each part, by its name."""
        return asdict(self)


@dataclass(frozen=True)
class TurnRequirements:
    """What a job asks of every client."""

    start: int  # the chain's lowest layer
    batch_size: int  # examples in an optimizer step
    epochs: int  # epochs of a turn, or its optimizer steps if the job gives these
    global_branch: bool  # True if the loss has a global branch, through the adapters above the window
    trains_above: bool  # True if those adapters are trained as well
    profiles: int  # examples in a CKA profile; 0 if the chain's start is given
    exact: bool = False  # True if the loss is the whole model's: a step runs the layers above the window as well
    rank: int = 0  # of the job's LoRAs; 0 if it has none
    fits_head: bool = False  # True if the head is fitted in closed form, from sums over a client's examples


def layers_run(memory: MemoryProfile, requirements: TurnRequirements, window: Window) -> int:
    """How many layers a step runs: those of the window and, with an exact look-ahead, all above.

    The window's bottom layer does not run if its adapter follows it: its output is in the prefix cache.
    """
    return (memory.layers - 1 if requirements.exact else window.top) - window.bottom + memory.inside


def footprint(
    memory: MemoryProfile,
    requirements: TurnRequirements,
    window: Window,
    micro_batch: int,
    tokens: int,
    weights: WeightPlacement,
    activations: SavedActivations,
) -> Footprint:
    """The bytes of a training step at its peak, with ``micro_batch`` examples of ``tokens`` tokens."""
    sequence = _sequence_of(memory, requirements, window, activations)
    peak, saved = _highest(memory, sequence, micro_batch, tokens)
    above = memory.layers - 1 - window.top
    trained = (len(window) + (above if requirements.trains_above else 0)) * memory.adapter
    trained_head = 0 if memory.streamed_head else memory.head
    received = (memory.layers - requirements.start) * memory.adapter
    resident = layers_run(memory, requirements, window)
    streams = memory.streamed_head or (weights == "streamed" and resident > 0)
    # Each layer that is run again keeps the pooled features that it begins with.
    pooled = pooled_bytes(memory, micro_batch) * (1 + resident * (activations == "recomputed"))
    rows = 0 if activations == "offloaded" else min(peak, micro_batch * tokens * memory.hidden * memory.itemsize)
    saved = max(saved - rows, 0)  # `rows` are the first adapter's saved input: count them once
    return Footprint(
        layer_weights=resident * (memory.layer if weights == "resident" else memory.unstreamed),
        buffers=memory.slices if streams else 0,
        adapters=received + trained,  # copies are trained
        head=memory.head + trained_head,
        gradients=trained + trained_head,
        optimizer=ADAM_STATES * (trained + trained_head),
        cache_pages=rows,
        saved_activations=saved,
        transients=peak - rows - saved + memory.call.at(micro_batch, tokens) + pooled,
        runtime=memory.skeleton + RUNTIME,
    )


@dataclass(frozen=True)
class _Sequence:
    """The parts of a step in forward order. A global branch begins again from the window's output and ends with a head, too."""

    local: list[PartMemory]
    branch: list[PartMemory]


def _highest(memory: MemoryProfile, sequence: _Sequence, batch: int, tokens: int) -> tuple[int, int]:
    """The peak in bytes of a step's activations, and how many of these bytes were saved for the backward pass."""
    parts, head = [*sequence.local, *sequence.branch], len(sequence.local) - 1
    # The window's output is kept for the global branch. In the backward pass its gradient is kept until the local branch is
    # done.
    waiting = batch * tokens * memory.hidden * memory.itemsize if sequence.branch else 0
    moments = {id(part): _Moments.of(part, batch, tokens) for part in parts}
    peak, at_peak, saved = 0, 0, 0
    for place, part in enumerate(parts):
        total = saved + moments[id(part)].forward + (waiting if place > head else 0)
        saved += moments[id(part)].saved
        if total > peak:
            peak, at_peak = total, min(saved, total)
    for place, part in reversed(list(enumerate(parts))):
        below = saved - moments[id(part)].saved
        total = below + moments[id(part)].backward + (waiting if place == head else 0)
        if total > peak:
            peak, at_peak = total, saved
        saved = below
    return peak, at_peak


def _sequence_of(
    memory: MemoryProfile, requirements: TurnRequirements, window: Window, activations: SavedActivations
) -> _Sequence:
    """The parts of a step: the window, the head and, for a global branch, the emulators and the head again.

    With an exact look-ahead the layers above the window, each with its frozen adapter, are between the window and the head.
    """
    step = memory.activations_offloaded if activations == "offloaded" else memory.kept
    above = memory.layers - 1 - window.top
    if activations == "recomputed":
        entrance = () if memory.inside else (step.adapter,)
        local = [*entrance, *layers_run(memory, requirements, window) * (memory.recomputed,), step.head]
    elif memory.inside:
        local = [*len(window) * (step.adapter,), *above * requirements.exact * (step.layer,), step.head]
    else:
        beyond = above * (step.layer, step.emulator) if requirements.exact else ()
        local = [step.adapter, *(len(window) - 1) * (step.layer, step.adapter), *beyond, step.head]
    if requirements.exact or not (above and requirements.global_branch):
        return _Sequence(local, [])
    return _Sequence(local, [*above * (step.adapter if requirements.trains_above else step.emulator,), step.head])


def saved_bytes(memory: MemoryProfile, requirements: TurnRequirements, window: Window, batch: int, tokens: int) -> int:
    """The bytes that a step saves for its backward pass, if it keeps them all."""
    sequence = _sequence_of(memory, requirements, window, "kept")
    return sum(part.saved.at(batch, tokens) for part in (*sequence.local, *sequence.branch))


@dataclass(frozen=True)
class _Moments:
    """A part's bytes for one shape of the batch."""

    forward: int
    saved: int
    backward: int

    @classmethod
    def of(cls, part: PartMemory, batch: int, tokens: int) -> "_Moments":
        return cls(part.forward_at(batch, tokens), part.saved.at(batch, tokens), part.backward_at(batch, tokens))


def pooled_bytes(memory: MemoryProfile, batch: int) -> int:
    """The bytes of the pooled features that accompany the hidden states of a batch."""
    return batch * (memory.head_layers - 1) * memory.hidden * FLOAT32
