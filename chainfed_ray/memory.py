"""The planner: what a client's turn needs, by arithmetic, before anything runs. Bytes only.

A turn has two phases, and needs the larger of them: *advance* (a layer and a micro-batch without gradients) and *train* (the
window's Q - 1 base layers, its adapters, the head, their gradients and AdamW state, and a micro-batch's saved activations).
"""

from dataclasses import dataclass

FLOAT32 = 4
# Libraries keep a few MiB the first time that they multiply, sort or open something.
SLACK = 6 * 2**20


@dataclass(frozen=True)
class Shape:
    """What the arithmetic needs to know of a job."""

    layer_bytes: int
    hidden: int  # D
    widest: int  # the feed-forward width
    itemsize: int  # bytes of an activation's element
    window: int  # Q
    adapters: int  # in the whole chain
    bottleneck: int  # R
    classes: int  # C
    tokens: int  # T, the longest example
    prefix_batch: int


@dataclass(frozen=True)
class Footprint:
    """Bytes of a turn by part."""

    layer_weights: int
    adapters_and_head: int
    gradients_and_optimizer: int
    activations: int
    slack: int

    @property
    def total(self) -> int:
        """All parts together."""
        return (
            self.layer_weights + self.adapters_and_head + self.gradients_and_optimizer + self.activations + self.slack
        )


@dataclass(frozen=True)
class Plan:
    """How a client does its turns: examples in memory at once, and the bytes that it then needs."""

    micro_batch: int
    planned_bytes: int


def footprint(shape: Shape, micro_batch: int) -> Footprint:
    """The bytes of a turn at ``micro_batch`` examples at once."""
    adapter = (2 * shape.hidden * shape.bottleneck + shape.hidden + shape.bottleneck) * FLOAT32
    head = (shape.hidden * shape.classes + shape.classes + 2 * shape.hidden) * FLOAT32
    stack = shape.adapters * adapter + head
    row = shape.tokens * shape.itemsize
    # Two layers while one takes the other's place; twice the hidden states and the widest product while it runs.
    advance_weights = 2 * shape.layer_bytes
    advance_activations = shape.prefix_batch * row * (6 * shape.hidden + 2 * shape.widest)
    # A layer whose weights are frozen saves what its products of activations need: about 12 D and 3 times the widest.
    in_layers = (shape.window - 1) * (12 * shape.hidden + 3 * shape.widest) * shape.itemsize
    in_adapters = shape.adapters * (2 * shape.hidden + 3 * shape.bottleneck) * FLOAT32
    train_weights = (shape.window - 1) * shape.layer_bytes
    train_activations = micro_batch * shape.tokens * (in_layers + in_adapters + 4 * shape.hidden * FLOAT32)
    training = train_weights + train_activations >= advance_weights + advance_activations
    return Footprint(
        layer_weights=train_weights if training else advance_weights,
        adapters_and_head=2 * stack,  # the stack that came, and the copy that goes back
        gradients_and_optimizer=3 * stack,
        activations=train_activations if training else advance_activations,
        slack=SLACK,
    )


def plan(shape: Shape, batch_size: int, budget: int) -> Plan | None:
    """The largest micro-batch that fits ``budget`` bytes: ``batch_size`` halved until it does; None if 1 does not."""
    micro_batch = batch_size
    while micro_batch >= 1:
        needed = footprint(shape, micro_batch).total
        if needed <= budget:
            return Plan(micro_batch, needed)
        micro_batch //= 2
    return None


def lacking(shape: Shape, budget: int) -> int:
    """The bytes by which ``budget`` misses the smallest plan."""
    return max(footprint(shape, 1).total - budget, 0)
