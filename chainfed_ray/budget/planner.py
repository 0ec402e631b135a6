"""The planner: how a client takes its turn, and how many bytes that needs. It computes with integers before anything runs.

A turn first advances the prefix cache and then takes training steps (``footprint.py``); it needs the larger of the two.

A client gets the widest window that fits its budget. For that window the planner prefers saved activations in memory to
activations that are computed again in the backward pass, and these to activations on disk; resident weights to streamed ones;
and last the largest micro-batch. The gradients of micro-batches add up to the batch's, so these choices do not change what is
trained.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.footprint import (
    ADAM_STATES,
    FLOAT32,
    RUNTIME,
    Footprint,
    SavedActivations,
    TurnRequirements,
    WeightPlacement,
    footprint,
    pooled_bytes,
    saved_bytes,
)
from chainfed_ray.chain import Window

PREFIX_BATCH = 8  # the most examples that are run through the prefix together
_FLOAT64 = 8
_EMBEDDING_STATES = 6  # token rows, rows by position, sums with positions and types, and their norm
_POOLING_STATES = 2  # hidden states and their product with the mask
_COMPARED, _GRAMS = 6, 5  # representations [n, D] and Gram matrices [n, n] of a CKA, and products of them


@dataclass(frozen=True)
class ClientResources:
    """What a client may use, and what its examples are like."""

    memory: int  # bytes
    longest: int  # tokens of the longest example
    cached: bool  # True if its disk has room for the prefix cache
    offload_disk: int | None  # bytes of disk for offloaded activations; None: unlimited
    batch: int  # examples in its largest batch: an optimizer step's, or all that it has if they are fewer
    one_step: bool  # True if its turn is one optimizer step: the optimizer's state is made when activations are gone
    rank: int | None = None  # how many of a LoRA's ranks it trains; None: all


@dataclass(frozen=True)
class Prefix:
    """How a client gets the activations below its window: from a cache, or recomputed in each step."""

    batch: int  # examples at a time
    weights: WeightPlacement
    cached: bool
    planned_bytes: int
    profile_bytes: int  # what a turn that makes a CKA profile needs; 0 if there is none


@dataclass(frozen=True)
class TurnPlan:
    """How a client takes a turn, and the bytes that the turn needs."""

    window: Window
    micro_batch: int
    weights: WeightPlacement
    activations: SavedActivations
    prefix: Prefix
    footprint: Footprint
    offload_bytes: int  # disk for offloaded activations
    rank: int | None = None  # how many of a LoRA's ranks are trained, the first ones; None: all

    @cached_property
    def planned_bytes(self) -> int:
        """The peak in bytes of the whole turn."""
        return max(self.footprint.total, self.prefix.planned_bytes)


# The fastest first. A layer that computes its activations again runs three times in a step and not twice.
_STRATEGIES: tuple[tuple[WeightPlacement, SavedActivations], ...] = (
    ("resident", "kept"),
    ("streamed", "kept"),
    ("resident", "recomputed"),
    ("streamed", "recomputed"),
    ("streamed", "offloaded"),
)
_PLACEMENTS: tuple[WeightPlacement, ...] = ("resident", "streamed")


def plan(
    memory: MemoryProfile, requirements: TurnRequirements, stage: Window, resources: ClientResources
) -> TurnPlan | None:
    """The best plan for a turn in ``stage`` that fits ``resources``, or None if there is none.

    A window narrower than the stage's has the same top, so that every client trains the same head on the same layer's output.
    """
    prefixes = list(_prefixes_that_fit(memory, requirements, resources))
    if resources.cached:
        # Every stage uses the cache, and its bits depend on how it was made: so it is always made in the fastest way that fits.
        prefixes = prefixes[:1]
    for window in (Window(bottom, stage.top) for bottom in stage):
        for (weights, activations), prefix in product(_STRATEGIES, prefixes):
            for micro_batch in _halvings(resources.batch):
                made = _plan(memory, requirements, window, micro_batch, weights, activations, prefix, resources)
                if made.footprint.total <= resources.memory and _has_room(made, resources):
                    return made
    return None


def fallback_plan(
    memory: MemoryProfile, requirements: TurnRequirements, stage: Window, resources: ClientResources, than: TurnPlan
) -> TurnPlan | None:
    """The best plan that needs at most two thirds of the memory of ``than``, for a client that exceeded that plan."""
    return plan(memory, requirements, stage, replace(resources, memory=than.planned_bytes * 2 // 3))


def shortfall(memory: MemoryProfile, requirements: TurnRequirements, stage: Window, resources: ClientResources) -> int:
    """How many more bytes of memory a client needs to take part: 0 if some plan fits it."""
    if plan(memory, requirements, stage, resources):
        return 0
    top = Window(stage.top, stage.top)
    prefixes = [_prefix(memory, requirements, resources, 1, weights) for weights in _PLACEMENTS]
    smallest = [
        _plan(memory, requirements, top, 1, weights, activations, prefix, resources)
        for (weights, activations), prefix in product(_STRATEGIES, prefixes)
    ]
    needs = (max(way.planned_bytes, way.prefix.profile_bytes) for way in smallest if _has_room(way, resources))
    return min(needs) - resources.memory


def cache_bytes(memory: MemoryProfile, requirements: TurnRequirements, examples: int, tokens: int) -> int:
    """The disk in bytes for a prefix cache of ``examples`` with ``tokens`` in all, and for features of the layers below.

    The cache holds up to four layers at once: the lowest of the chain, the lowest of the stage, and two while it advances. A
    fitted head needs the pooled features of every layer as well.
    """
    features = examples * memory.layers * memory.hidden * FLOAT32 if requirements.fits_head else 0
    return 4 * (tokens * memory.hidden * memory.itemsize + pooled_bytes(memory, examples)) + features


def running_bytes(memory: MemoryProfile, batch: int, tokens: int) -> int:
    """The bytes that a layer or an adapter holds without gradients, besides its weights."""
    return max(part.forward_at(batch, tokens) for part in (memory.advance, memory.advance_adapter))


def embedding_bytes(memory: MemoryProfile, batch: int, tokens: int) -> int:
    """The bytes that embedding a batch holds."""
    return batch * tokens * memory.hidden * _EMBEDDING_STATES * memory.itemsize


def scoring_bytes(memory: MemoryProfile, batch: int, tokens: int) -> int:
    """The bytes that the head and its loss hold, with the buffers of a streamed head."""
    return memory.kept.head.forward_at(batch, tokens) + (memory.slices if memory.streamed_head else 0)


def _prefixes_that_fit(
    memory: MemoryProfile, requirements: TurnRequirements, resources: ClientResources
) -> Iterator[Prefix]:
    """The ways to get the prefix that fit, the fastest first."""
    for weights in _PLACEMENTS:
        # A recomputed prefix is made one example at a time, so that its bits do not depend on the batch.
        for batch in _halvings(min(PREFIX_BATCH, resources.batch)) if resources.cached else (1,):
            made = _prefix(memory, requirements, resources, batch, weights)
            if max(made.planned_bytes, made.profile_bytes) <= resources.memory:
                yield made


def _plan(
    memory: MemoryProfile,
    requirements: TurnRequirements,
    window: Window,
    micro_batch: int,
    weights: WeightPlacement,
    activations: SavedActivations,
    prefix: Prefix,
    resources: ClientResources,
) -> TurnPlan:
    parts = footprint(memory, requirements, window, micro_batch, resources.longest, weights, activations)
    if resources.rank is not None:
        parts = _with_fewer_ranks(parts, len(window) * memory.adapter, requirements.rank, resources.rank)
    offload = 0
    if activations == "offloaded":
        offload = saved_bytes(memory, requirements, window, micro_batch, resources.longest)
    if prefix.weights == "streamed":
        parts = replace(parts, buffers=memory.slices)  # the prefix's buffers stay allocated during the steps
    if not prefix.cached:
        # A recomputed prefix is made between two steps, when the activations of the step itself are not alive.
        others = micro_batch * resources.longest * memory.hidden * memory.itemsize
        beside = prefix.planned_bytes - held_bytes(memory, requirements) + others
        step = parts.cache_pages + parts.saved_activations + parts.transients
        parts = replace(parts, transients=parts.transients + max(beside - step, 0))
    if resources.one_step:
        freed = parts.cache_pages + parts.saved_activations + parts.transients
        parts = replace(parts, optimizer=max(parts.optimizer - freed, 0))
    if requirements.fits_head:
        fit = _fitting(memory, requirements, parts, micro_batch, prefix, resources)
        parts = replace(parts, transients=parts.transients + max(fit - parts.total, 0))
    return TurnPlan(window, micro_batch, weights, activations, prefix, parts, offload, resources.rank)


def _with_fewer_ranks(parts: Footprint, window: int, rank: int, trained: int) -> Footprint:
    """``parts`` if ``trained`` of a LoRA's ``rank`` are trained; the LoRAs of the window take ``window`` bytes.

    A step puts the trained ranks beside the others: these copies are held until its backward pass is done.
    """
    fewer = window * (rank - trained) // rank
    return replace(
        parts,
        adapters=parts.adapters - fewer + window,
        gradients=parts.gradients - fewer,
        optimizer=parts.optimizer - ADAM_STATES * fewer,
    )


def _fitting(
    memory: MemoryProfile,
    requirements: TurnRequirements,
    parts: Footprint,
    micro_batch: int,
    prefix: Prefix,
    resources: ClientResources,
) -> int:
    """The peak in bytes of fitting the head: the window without gradients, the sums (F² numbers) and the head."""
    rows = micro_batch * resources.longest * memory.hidden
    running = running_bytes(memory, micro_batch, resources.longest)
    running += memory.call.at(micro_batch, resources.longest)
    if not prefix.cached:
        running = max(running, prefix.planned_bytes - held_bytes(memory, requirements) + rows * memory.itemsize)
    pooling = rows * (memory.itemsize + _POOLING_STATES * FLOAT32)
    features = min(memory.head_layers, memory.layers) * memory.hidden
    sums = features**2 * FLOAT32 + memory.head
    sent = sums // 2 + features * FLOAT32  # half of the products is sent, after the last batch is freed
    return held_bytes(memory, requirements) + parts.layer_weights + parts.buffers + max(running, pooling, sent) + sums


def _prefix(
    memory: MemoryProfile,
    requirements: TurnRequirements,
    resources: ClientResources,
    batch: int,
    weights: WeightPlacement,
) -> Prefix:
    states = batch * resources.longest * memory.hidden
    # The prefix runs layer by layer, with the next layer loaded ahead. Embedding runs when the first layer is already loaded.
    loaded = 2 * memory.layer + memory.conversion if weights == "resident" else memory.unstreamed + memory.slices
    embedding = embedding_bytes(memory, batch, resources.longest)
    running = running_bytes(memory, batch, resources.longest)
    running += memory.call.at(batch, resources.longest) + 2 * pooled_bytes(memory, batch)
    needed = loaded + max(running, embedding) + held_bytes(memory, requirements)
    # A profile's means over tokens are taken in float64, when no layer is loaded.
    pooling = states * (memory.itemsize + _POOLING_STATES * _FLOAT64)
    compared = requirements.profiles * (_COMPARED * memory.hidden + _GRAMS * requirements.profiles) * _FLOAT64
    profile = max(needed, pooling + held_bytes(memory, requirements)) + compared if requirements.profiles else 0
    return Prefix(batch, weights, resources.cached, needed, profile)


def _has_room(made: TurnPlan, resources: ClientResources) -> bool:
    return resources.offload_disk is None or made.offload_bytes <= resources.offload_disk


def held_bytes(memory: MemoryProfile, requirements: TurnRequirements) -> int:
    """The bytes that a turn always holds: the stack that it received, and the process's own."""
    return (memory.layers - requirements.start) * memory.adapter + memory.head + memory.skeleton + RUNTIME


def _halvings(count: int) -> Iterator[int]:
    while count:
        yield count
        count //= 2
