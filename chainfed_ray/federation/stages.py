"""The schedule of a job's rounds: which window is trained next, at which rates, and when its stage ends.

All of it follows from the committed rounds and the job's sections ``rounds`` and ``chain``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, NamedTuple

from chainfed_ray.chain import Chain, Window
from chainfed_ray.federation.selection import kept_exit
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.records.rounds import Restored, Round
from chainfed_ray.spec.sections import ConvergenceSpec, RoundsSpec


class RoundSpec(NamedTuple):
    """The next round: its window with its exit, and the rounds that its stage has ``spent`` of its ``limit``.

    In a cyclic schedule both counts are the whole job's.
    """

    round_index: int
    stage: int
    window: Window
    exit: int
    spent: int
    limit: int

    @property
    def last_of_stage(self) -> bool:
        """True if the stage may have no round after this one."""
        return self.spent + 1 == self.limit


class StageSchedule:
    """The schedule of a job over ``chain``, of at most ``total`` rounds."""

    def __init__(self, rounds: RoundsSpec, schedule: Literal["staged", "cyclic"], chain: Chain, total: int) -> None:
        self._chain, self._total = chain, total
        self._rounds, self._cyclic = rounds, schedule == "cyclic"

    @property
    def restores_best(self) -> bool:
        """True if a stage ends with its best stack. A cyclic schedule does not: exits at different tops cannot be compared."""
        return self._rounds.restore_best and not self._cyclic

    def begun_with(self, upcoming: RoundSpec, history: Sequence[Round]) -> Restored | None:
        """The exit with which a stage begins, if it can be compared with the stage's own: they are at the same layer."""
        before = [record for record in history if record.stage < upcoming.stage]
        return kept_exit(before[-1]) if before and self._chain.look_ahead == "exact" else None

    def next(self, history: Sequence[Round]) -> RoundSpec | None:
        """The round after those of ``history``; None if the job has had all its rounds."""
        done = len(history)
        if done == self._total:
            return None
        if self._cyclic:
            window = self._chain.cyclic(done, self._total)
            stage = self._chain.windows.index(window)
            return RoundSpec(done, stage, window, self._chain.exit(window), done, self._total)
        stages = self._chain.staged(self._total, self._rounds.last_stage_share)
        index = sum(record.ended is not None for record in history)
        if index == len(stages):
            return None
        spent = sum(record.stage == index for record in history)
        # The last stage gets the rounds that earlier stages did not need.
        limit = stages[index].rounds if index < len(stages) - 1 else self._total - (done - spent)
        window = stages[index].window
        return RoundSpec(done, index, window, self._chain.exit(window), spent, limit)

    def starts_head(self, upcoming: RoundSpec, history: Sequence[Round]) -> bool:
        """True for the first round of a head. With an exact look-ahead, and in a cyclic schedule, a job has one head.

        Otherwise each stage has a head of its own, on the output of its own window.
        """
        single = self._cyclic or self._chain.look_ahead == "exact"
        return not (history if single else any(record.stage == upcoming.stage for record in history))

    def counted_rounds(self, upcoming: RoundSpec, history: Sequence[Round]) -> list[Round]:
        """The rounds of its stage so far that had a quorum."""
        return [record for record in history if record.stage == upcoming.stage and record.counted]

    def starts_span(self, upcoming: RoundSpec, history: Sequence[Round]) -> bool:
        """True for the first round of a span, over which the window's movement is measured."""
        return len(self.counted_rounds(upcoming, history)) % self._rounds.convergence.span == 0

    def ended(self, upcoming: RoundSpec, rounds: int, losses: Sequence[float], movement: float | None) -> str | None:
        """The reason why the stage ends with this round; None if it goes on.

        ``rounds`` are the stage's counted ones. They, the held-out ``losses`` and the span's ``movement`` include this round.
        """
        if upcoming.last_of_stage:
            return "round limit"
        if self._cyclic:
            return None
        whole_span = rounds % self._rounds.convergence.span == 0
        return verdict(self._rounds.convergence, rounds, losses, movement if whole_span else None)


def rate_at(rounds: RoundsSpec, spent: int, limit: int) -> float:
    """The factor on the full learning rate, above 0 and at most 1, after ``spent`` of at most ``limit`` rounds of a stage.

    The default is a cosine, because a constant rate collapsed with few clients a round.
    """
    warmup = min(rounds.warmup, limit - 1)
    if spent < warmup:
        return (spent + 1) / (warmup + 1)
    progress = (spent - warmup) / (limit - warmup)
    if rounds.decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if rounds.decay == "linear" else 1.0


@dataclass(frozen=True)
class Movement:
    """Effective movement: |sum of updates| ÷ sum of |updates| over a span of H rounds, both summed over the parameters.

    It is 1 while all updates go the same way, and falls towards 0 when they cancel out. The two sums of a span are two copies
    of the window, in ``tensors``, which are committed: a restart continues with them.
    """

    tensors: Tensors = field(default_factory=dict)

    def with_round(self, before: Tensors, after: Tensors) -> "Movement":
        """This movement and that of one more round: the tensors of the window before and after it."""
        sums = dict(self.tensors)
        for name, new in after.items():
            change = new - before[name]
            for key, value in ((f"net.{name}", change), (f"path.{name}", change.abs())):
                sums[key] = sums[key] + value if key in sums else value
        return Movement(sums)

    def value(self) -> float:
        """The effective movement of the span so far, in [0, 1]."""
        net = sum(
            tensor.abs().double().sum().item() for name, tensor in self.tensors.items() if name.startswith("net.")
        )
        path = sum(tensor.double().sum().item() for name, tensor in self.tensors.items() if name.startswith("path."))
        return net / path if path else 0.0


def verdict(rule: ConvergenceSpec, rounds: int, losses: Sequence[float], movement: float | None) -> str | None:
    """The reason why a stage has converged after ``rounds`` counted rounds; None if it has not.

    ``losses`` are its held-out losses. ``movement`` is that of a span which is complete with this round, and else None.
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
