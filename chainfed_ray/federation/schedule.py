"""How learning rates go over a stage: they rise, if they are to, and then fall towards zero."""

import math

from chainfed_ray.spec.sections import RoundsSpec


def rate_at(rounds: RoundsSpec, spent: int, limit: int) -> float:
    """The share of the full rate in a round of a stage that had ``spent`` of its ``limit`` rounds: above 0, at most 1.

    A constant rate with few clients a round was seen to collapse, hence the cosine by default.
    """
    warmup = min(rounds.warmup, limit - 1)
    if spent < warmup:
        return (spent + 1) / (warmup + 1)
    progress = (spent - warmup) / (limit - warmup)
    if rounds.decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if rounds.decay == "linear" else 1.0
