"""The course of a job's rounds: which window is trained next, at which rates, and when its stage ends.

It follows from the rounds so far.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from chainfed_ray.chain import Chain, Window
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.records.rounds import Round
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.sections import ConvergenceSpec, RoundsSpec


class RoundSpec(NamedTuple):
    """The window of the next round, and how many rounds its stage had of those that it may have.

    Where windows take turns, that is the whole job's.
    """

    round_index: int
    stage: int
    window: Window
    spent: int
    limit: int

    @property
    def last_of_stage(self) -> bool:
        """Whether there are no more rounds for the stage after this one."""
        return self.spent + 1 == self.limit


class StageSchedule:
    """The course of a job over ``chain``, of ``total`` rounds at most."""

    def __init__(self, spec: JobSpec, chain: Chain, total: int) -> None:
        self._chain, self._total = chain, total
        self._rounds, self._in_turns = spec.rounds, spec.chain.schedule == "cyclic"

    @property
    def goes_back(self) -> bool:
        """Whether stages go back to their best. Where windows take turns, exits at different tops are no rivals."""
        return self._rounds.restore_best and not self._in_turns

    def next(self, history: Sequence[Round]) -> RoundSpec | None:
        """The round after those of ``history``; None if they are all."""
        done = len(history)
        if done == self._total:
            return None
        if self._in_turns:
            window = self._chain.cyclic(done, self._total)
            return RoundSpec(done, window.bottom - self._chain.start, window, done, self._total)
        stages = self._chain.staged(self._total, self._rounds.last_stage_share)
        index = sum(record.ended is not None for record in history)
        if index == len(stages):
            return None
        spent = sum(record.stage == index for record in history)
        # What the stages before did not need goes to the last.
        limit = stages[index].rounds if index < len(stages) - 1 else self._total - (done - spent)
        return RoundSpec(done, index, stages[index].window, spent, limit)

    def opens(self, upcoming: RoundSpec, history: Sequence[Round]) -> bool:
        """Whether a stage begins with it. Windows that take turns share one head: to them there is one beginning."""
        return not (history if self._in_turns else any(record.stage == upcoming.stage for record in history))

    def counted_rounds(self, upcoming: RoundSpec, history: Sequence[Round]) -> list[Round]:
        """Those of its stage so far that had a quorum."""
        return [record for record in history if record.stage == upcoming.stage and record.counted]

    def opens_span(self, upcoming: RoundSpec, history: Sequence[Round]) -> bool:
        """Whether a span of rounds begins with it, over which the window's movement is measured."""
        return len(self.counted_rounds(upcoming, history)) % self._rounds.convergence.span == 0

    def ended(self, upcoming: RoundSpec, rounds: int, losses: Sequence[float], movement: float | None) -> str | None:
        """Why the stage ends with it, if it does: it then has so many counted ``rounds``, these held-out ``losses`` and this
        ``movement`` in its span.
        """
        if upcoming.last_of_stage:
            return "round limit"
        if self._in_turns:
            return None
        whole_span = rounds % self._rounds.convergence.span == 0
        return verdict(self._rounds.convergence, rounds, losses, movement if whole_span else None)


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


class Movement:
    """Effective movement: |sum of updates| ÷ sum of |updates| over H rounds, both summed over the parameters.

    1 while every update goes the same way, towards 0 when they cancel out. H-round spans follow one another; a span's
    two sums are two copies of the window, kept as ``tensors`` so that a restart goes on where it was.
    """

    def __init__(self, tensors: Tensors | None = None) -> None:
        self.tensors: Tensors = tensors or {}

    def add(self, before: Tensors, after: Tensors) -> None:
        """Add the update of one round: the tensors of the window before and after it."""
        for name, new in after.items():
            change = new - before[name]
            self._add(f"net.{name}", change)
            self._add(f"path.{name}", change.abs())

    def _add(self, name: str, change: Tensor) -> None:
        self.tensors[name] = self.tensors[name] + change if name in self.tensors else change

    def value(self) -> float:
        """The effective movement of the span so far, in [0, 1]."""
        net = sum(
            tensor.abs().double().sum().item() for name, tensor in self.tensors.items() if name.startswith("net.")
        )
        path = sum(tensor.double().sum().item() for name, tensor in self.tensors.items() if name.startswith("path."))
        return net / path if path else 0.0


def verdict(rule: ConvergenceSpec, rounds: int, losses: Sequence[float], movement: float | None) -> str | None:
    """Why a stage of ``rounds`` counted rounds ends now, or None.

    ``losses`` are its held-out losses; ``movement`` is that of a span that is complete with this round, else None.
    """
    if rounds < rule.minimum:
        return None
    if rule.rule == "movement" and movement is not None and movement < rule.threshold:
        return f"converged: effective movement {movement:.3g} over {rule.span} rounds, below {rule.threshold:g}"
    if rule.rule == "plateau" and len(losses) >= 2 * rule.span:
        before = fmean(losses[-2 * rule.span : -rule.span])
        now = fmean(losses[-rule.span :])
        if before - now < rule.threshold * abs(before):
            return f"converged: held-out loss {before:.4f} → {now:.4f} over {rule.span} rounds"
    return None
