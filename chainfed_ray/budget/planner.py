"""The planner: what a client's turn needs, by arithmetic, before anything runs. Integers only, and no tensor.

A turn advances the prefix cache and then takes training steps; it needs the larger of the two. What a step holds follows
from the order of its parts (adapters, layers, head, stand-ins): on the way forward each part leaves behind what it saved for
the way back. ``MemoryProfile`` (demand.py) says what each part takes.

A client gets the widest window that fits its budget; then layers that stay resident, or else matrices that are streamed, or
else saved activations on disk as well; then the largest micro-batch. Gradients of micro-batches add up to the batch's, so
that none of these changes what is trained.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Literal

from chainfed_ray.budget.demand import MemoryProfile, PartMemory, StepMemory
from chainfed_ray.chain import Window

# What is loaded at once: whole layers, kept for as long as they are used; or slices of one matrix at a time.
WeightPlacement = Literal["resident", "streamed"]

# What arithmetic cannot know, as it was measured: what libraries allocate on the side, and what the interpreter keeps.
RUNTIME = 6 * 2**20
PREFIX_BATCH = 8  # examples that enter the prefix cache together
_ADAM_STATES = 2
_FLOAT32, _FLOAT64 = 4, 8
_EMBEDDING_STATES = 6  # rows, rows by place, sums with positions and types, and their norm
_POOLING_STATES = 2  # the hidden states and their product with the mask
_COMPARED, _GRAMS = 6, 5  # representations [n, D] and Gram matrices [n, n] of a CKA, with their products


@dataclass(frozen=True)
class Footprint:
    """Bytes of a turn's training at its highest moment, by part."""

    layer_weights: int
    buffers: int  # slices of streamed matrices
    adapters: int
    head: int
    gradients: int
    optimizer: int
    cache_pages: int  # the batch that was read from the prefix cache; the cache itself is never mapped
    saved_activations: int
    transients: int
    runtime: int  # the model's skeleton, and what libraries and the interpreter keep

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The bytes by the name of the part."""
        return asdict(self)


@dataclass(frozen=True)
class ClientResources:
    """What a client may use, and what its texts are like."""

    memory: int
    longest: int  # tokens of the longest example
    cached: bool  # whether its disk holds the prefix cache
    offload_disk: int | None  # bytes of disk for saved activations; None: as many as there are
    batch: int  # examples of its largest batch: those of an optimizer step, or all that it has
    one_step: bool  # … which is its only one: its optimizer has no state before its activations are gone


@dataclass(frozen=True)
class TurnRequirements:
    """What a job asks of every client."""

    start: int  # the chain's lowest layer
    batch_size: int  # examples in an optimizer step
    epochs: int  # of a turn, or optimizer steps where it has so many
    global_branch: bool  # a global branch through the stand-ins above the window
    trains_above: bool  # … which are trained as well
    profiles: int  # examples of a CKA profile, by which the chain's start is found; 0 where it is given
    fits_head: bool = False  # in closed form, from sums over a client's examples


@dataclass(frozen=True)
class Prefix:
    """How a client comes by the activations below its window: so many examples at a time; from a cache, or for each step."""

    batch: int
    weights: WeightPlacement
    cached: bool
    planned_bytes: int
    profile_bytes: int  # of a turn that profiles the layers; 0 where none does


@dataclass(frozen=True)
class TurnPlan:
    """How a client takes a turn, and the bytes that it then needs."""

    window: Window
    micro_batch: int
    weights: WeightPlacement
    activations_offloaded: bool
    prefix: Prefix
    footprint: Footprint
    offload_bytes: int  # on disk

    @property
    def planned_bytes(self) -> int:
        """The most that the turn holds."""
        return max(self.footprint.total, self.prefix.planned_bytes)


# The fastest first. Saved activations go to disk only where one example at a time does not fit otherwise.
_WAYS: tuple[tuple[WeightPlacement, bool], ...] = (("resident", False), ("streamed", False), ("streamed", True))
_PLACEMENTS: tuple[WeightPlacement, ...] = ("resident", "streamed")


def plan(costs: MemoryProfile, task: TurnRequirements, stage: Window, means: ClientResources) -> TurnPlan | None:
    """The best way to take a turn in ``stage`` that fits; None if there is none.

    A window narrower than the stage's has the same top, so that every client trains the same head on the same output.
    """
    prefixes = list(_prefixes_that_fit(costs, task, means))
    if means.cached:
        # Made before the steps, and the same in every stage: a cache is made in one way only.
        prefixes = prefixes[:1]
    for window in (Window(bottom, stage.top) for bottom in stage):
        for (weights, activations_offloaded), prefix in product(_WAYS, prefixes):
            for micro_batch in _halvings(means.batch):
                made = _plan(costs, task, window, micro_batch, weights, activations_offloaded, prefix, means)
                if made.footprint.total <= means.memory and _has_room(made, means):
                    return made
    return None


def fallback_plan(
    costs: MemoryProfile, task: TurnRequirements, stage: Window, means: ClientResources, than: TurnPlan
) -> TurnPlan | None:
    """The best way to take a turn that needs two thirds of the memory, for a client that exceeded its plan."""
    return plan(costs, task, stage, replace(means, memory=than.planned_bytes * 2 // 3))


def shortfall(costs: MemoryProfile, task: TurnRequirements, stage: Window, means: ClientResources) -> int:
    """The bytes of memory by which ``means`` miss the leanest way of all."""
    if plan(costs, task, stage, means):
        return 0
    top = Window(stage.top, stage.top)
    leanest = [
        _plan(costs, task, top, 1, "streamed", activations_offloaded, _prefix(costs, task, means, 1, weights), means)
        for weights, activations_offloaded in product(_PLACEMENTS, (False, True))
    ]
    needs = (max(way.planned_bytes, way.prefix.profile_bytes) for way in leanest if _has_room(way, means))
    return min(needs) - means.memory


def cache_bytes(costs: MemoryProfile, task: TurnRequirements, examples: int, tokens: int) -> int:
    """Disk for a prefix cache of so many ``tokens`` in all, and what the head reads of each example below them.

    It has the lowest layer of the chain and of the stage, and two as one is made. For a fitted head there are the features of
    every layer besides.
    """
    features = examples * costs.layers * costs.hidden * _FLOAT32 if task.fits_head else 0
    return 4 * (tokens * costs.hidden * costs.itemsize + _read_bytes(costs, examples)) + features


def running_bytes(costs: MemoryProfile, batch: int, tokens: int) -> int:
    """What a layer or an adapter holds besides its weights, without gradients."""
    return max(part.forward_at(batch, tokens) for part in (costs.advance, costs.advance_adapter))


def embedding_bytes(costs: MemoryProfile, batch: int, tokens: int) -> int:
    """What is held as a batch is embedded."""
    return batch * tokens * costs.hidden * _EMBEDDING_STATES * costs.itemsize


def scoring_bytes(costs: MemoryProfile, batch: int, tokens: int) -> int:
    """What the head holds, and the slices of a language model's."""
    return costs.kept.head.forward_at(batch, tokens) + (costs.slices if costs.streamed_head else 0)


def _prefixes_that_fit(costs: MemoryProfile, task: TurnRequirements, means: ClientResources) -> Iterator[Prefix]:
    """The ways to come by the prefix, the fastest first."""
    for weights in _PLACEMENTS:
        # What is made for each step is made example by example: the same bits, whichever batch asks for it.
        for batch in _halvings(min(PREFIX_BATCH, means.batch)) if means.cached else (1,):
            made = _prefix(costs, task, means, batch, weights)
            if max(made.planned_bytes, made.profile_bytes) <= means.memory:
                yield made


def footprint(
    costs: MemoryProfile,
    task: TurnRequirements,
    window: Window,
    micro_batch: int,
    tokens: int,
    weights: WeightPlacement,
    activations_offloaded: bool,
) -> Footprint:
    """The bytes of a training step of ``micro_batch`` examples of ``tokens`` tokens, at its highest moment."""
    peak, saved = _highest(
        costs, costs.activations_offloaded if activations_offloaded else costs.kept, task, window, micro_batch, tokens
    )
    above = costs.layers - 1 - window.top
    trained = (len(window) + (above if task.trains_above else 0)) * costs.adapter
    trained_head = 0 if costs.streamed_head else costs.head
    resident = len(window) - 1
    streams = costs.streamed_head or (weights == "streamed" and resident > 0)
    rows = 0 if activations_offloaded else min(peak, micro_batch * tokens * costs.hidden * costs.itemsize)
    saved = max(saved - rows, 0)  # the first adapter saves its input, if it has done so already
    return Footprint(
        layer_weights=resident * (costs.layer if weights == "resident" else costs.unstreamed),
        buffers=costs.slices if streams else 0,
        adapters=(costs.layers - task.start) * costs.adapter + trained,  # the stack that came, and copies to train
        head=costs.head + trained_head,
        gradients=trained + trained_head,
        optimizer=_ADAM_STATES * (trained + trained_head),
        cache_pages=rows,
        saved_activations=saved,
        transients=peak - rows - saved + costs.call.at(micro_batch, tokens) + _read_bytes(costs, micro_batch),
        runtime=costs.skeleton + RUNTIME,
    )


def _highest(
    costs: MemoryProfile, demands: StepMemory, task: TurnRequirements, window: Window, batch: int, tokens: int
) -> tuple[int, int]:
    """The most bytes of activations that are alive at once, and how many of them were saved for the way back."""
    sequence = _sequence(costs, demands, task, window)
    # The window's output waits for the global branch, and on the way back its gradient for the local one.
    branch = 2 * len(window) - 1
    waiting = batch * tokens * costs.hidden * costs.itemsize if len(sequence) > branch + 1 else 0
    moments = {id(part): _Moments.of(part, batch, tokens) for part in sequence}
    peak, at_peak, saved = 0, 0, 0
    for place, part in enumerate(sequence):
        total = saved + moments[id(part)].forward + (waiting if place > branch else 0)
        saved += moments[id(part)].saved
        if total > peak:
            peak, at_peak = total, min(saved, total)
    for place, part in reversed(list(enumerate(sequence))):
        below = saved - moments[id(part)].saved
        total = below + moments[id(part)].backward + (waiting if place == branch else 0)
        if total > peak:
            peak, at_peak = total, saved
        saved = below
    return peak, at_peak


def _sequence(costs: MemoryProfile, demands: StepMemory, task: TurnRequirements, window: Window) -> list[PartMemory]:
    """The parts of a step in the order of its forward pass: the window, the head, and with stand-ins the head again."""
    inside = [demands.adapter, *(len(window) - 1) * (demands.layer, demands.adapter), demands.head]
    above = costs.layers - 1 - window.top
    if not (above and task.global_branch):
        return inside
    return [*inside, *above * (demands.adapter if task.trains_above else demands.emulator,), demands.head]


def _saved(
    costs: MemoryProfile, demands: StepMemory, task: TurnRequirements, window: Window, batch: int, tokens: int
) -> int:
    return sum(part.saved.at(batch, tokens) for part in _sequence(costs, demands, task, window))


@dataclass(frozen=True)
class _Moments:
    """A part's bytes for one shape."""

    forward: int
    saved: int
    backward: int

    @classmethod
    def of(cls, part: PartMemory, batch: int, tokens: int) -> "_Moments":
        return cls(part.forward_at(batch, tokens), part.saved.at(batch, tokens), part.backward_at(batch, tokens))


def _plan(
    costs: MemoryProfile,
    task: TurnRequirements,
    window: Window,
    micro_batch: int,
    weights: WeightPlacement,
    activations_offloaded: bool,
    prefix: Prefix,
    means: ClientResources,
) -> TurnPlan:
    parts = footprint(costs, task, window, micro_batch, means.longest, weights, activations_offloaded)
    spill = _saved(costs, costs.kept, task, window, micro_batch, means.longest) if activations_offloaded else 0
    if prefix.weights == "streamed":
        parts = replace(parts, buffers=costs.slices)  # those of the prefix stay for the steps
    if not prefix.cached:
        # The prefix of a micro-batch is made between two steps: what the step itself holds is not there then.
        others = micro_batch * means.longest * costs.hidden * costs.itemsize
        beside = prefix.planned_bytes - held_bytes(costs, task) + others
        step = parts.cache_pages + parts.saved_activations + parts.transients
        parts = replace(parts, transients=parts.transients + max(beside - step, 0))
    if means.one_step:
        activations = parts.cache_pages + parts.saved_activations + parts.transients
        parts = replace(parts, optimizer=max(parts.optimizer - activations, 0))
    if task.fits_head:
        fit = _fitting(costs, task, parts, micro_batch, prefix, means)
        parts = replace(parts, transients=parts.transients + max(fit - parts.total, 0))
    return TurnPlan(window, micro_batch, weights, activations_offloaded, prefix, parts, spill)


def _fitting(
    costs: MemoryProfile,
    task: TurnRequirements,
    parts: Footprint,
    micro_batch: int,
    prefix: Prefix,
    means: ClientResources,
) -> int:
    """The most that a turn of fitting the head holds: the window without gradients, and sums as large as F² and the head."""
    rows = micro_batch * means.longest * costs.hidden
    running = running_bytes(costs, micro_batch, means.longest)
    running += costs.call.at(micro_batch, means.longest)
    if not prefix.cached:
        running = max(running, prefix.planned_bytes - held_bytes(costs, task) + rows * costs.itemsize)
    pooling = rows * (costs.itemsize + _POOLING_STATES * _FLOAT32)
    features = min(costs.head_layers, costs.layers) * costs.hidden
    sums = features**2 * _FLOAT32 + costs.head
    sent = sums // 2 + features * _FLOAT32  # half of the products, when the last batch is gone
    return held_bytes(costs, task) + parts.layer_weights + parts.buffers + max(running, pooling, sent) + sums


def _prefix(
    costs: MemoryProfile, task: TurnRequirements, means: ClientResources, batch: int, weights: WeightPlacement
) -> Prefix:
    states = batch * means.longest * costs.hidden
    # Layer by layer, with the next one loaded ahead; the embeddings are made when there is a layer already.
    loaded = 2 * costs.layer + costs.conversion if weights == "resident" else costs.unstreamed + costs.slices
    running, embedding = running_bytes(costs, batch, means.longest), embedding_bytes(costs, batch, means.longest)
    running += costs.call.at(batch, means.longest) + 2 * _read_bytes(costs, batch)
    needed = loaded + max(running, embedding) + held_bytes(costs, task)
    # A profile's means of the tokens are taken when no layer is there.
    pooling = states * (costs.itemsize + _POOLING_STATES * _FLOAT64)
    compared = task.profiles * (_COMPARED * costs.hidden + _GRAMS * task.profiles) * _FLOAT64
    profile = max(needed, pooling + held_bytes(costs, task)) + compared if task.profiles else 0
    return Prefix(batch, weights, means.cached, needed, profile)


def _read_bytes(costs: MemoryProfile, batch: int) -> int:
    """What comes with the hidden states of a batch of the layers below."""
    return batch * (costs.head_layers - 1) * costs.hidden * _FLOAT32


def _has_room(made: TurnPlan, means: ClientResources) -> bool:
    return means.offload_disk is None or made.offload_bytes <= means.offload_disk


def held_bytes(costs: MemoryProfile, task: TurnRequirements) -> int:
    """What is there in any case: the stack that came, and the process's own."""
    return (costs.layers - task.start) * costs.adapter + costs.head + costs.skeleton + RUNTIME


def _halvings(count: int) -> Iterator[int]:
    while count:
        yield count
        count //= 2
