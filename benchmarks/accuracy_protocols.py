"""The protocols of the accuracy benchmark: how many rounds each method gets, so that a comparison is fair. Arithmetic only.

CPU seconds are those of the clients' processes in their turns. A run has fixed costs and costs for each client-step. The fixed
costs are the profiles, the sums of a head in closed form, and the advance of the prefix caches: a run of any length pays them
once.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

PROTOCOLS = ("steps", "compute", "half-compute", "bytes", "target")

_LONGEST = (
    25  # the most rounds, in multiples of those at equal steps: a probe costs so little that it would run for ever
)

Point = tuple[int, float, int, float, float]
"""A point of a learning curve: client-steps, CPU seconds, bytes sent, seconds of the clients' turns, validation accuracy."""


class Spent(NamedTuple):
    """The cost of one turn. ``stage`` is the lowest layer of its stage's window, None for a turn that trained nothing."""

    client: str
    stage: int | None
    steps: int
    cpu_seconds: float
    sent_bytes: int


class Costs(NamedTuple):
    """The costs of a run of any length. The fixed costs are the sum over all clients and stages."""

    fixed_cpu_seconds: float
    step_cpu_seconds: float
    fixed_bytes: int
    bytes_per_round: float


def costs(turns: Sequence[Spent], clients: int, rounds: int) -> Costs:
    """Separate the costs of the ``turns`` of a run of ``rounds`` rounds into fixed costs and costs for each step.

    A client's first turn in a stage takes longer than later ones, because it advances the prefix cache. That excess is a fixed
    cost. It is counted for all ``clients`` of the fleet, even if the run did not sample each of them.
    """
    other = [turn for turn in turns if turn.stage is None]
    training = [turn for turn in turns if turn.stage is not None]
    first, later = _first_and_later(training)
    every_later = [seconds for stage in later.values() for seconds in stage]
    paid, due = 0.0, 0.0
    for stage, seconds in first.items():
        usual = later[stage] or every_later
        excess = max(fmean(seconds) - fmean(usual), 0.0) if usual else 0.0
        paid += excess * len(seconds)
        due += excess * clients
    steps = sum(turn.steps for turn in training)
    by_step = max(sum(turn.cpu_seconds for turn in training) - paid, 0.0)
    return Costs(
        fixed_cpu_seconds=sum(turn.cpu_seconds for turn in other) + due,
        step_cpu_seconds=by_step / steps if steps else 0.0,
        fixed_bytes=sum(turn.sent_bytes for turn in other),
        bytes_per_round=sum(turn.sent_bytes for turn in training) / rounds if rounds else 0.0,
    )


def _first_and_later(training: Iterable[Spent]) -> tuple[dict[int | None, list[float]], dict[int | None, list[float]]]:
    """The CPU seconds of turns by stage: of each client's first turn in the stage, and of its later turns."""
    first, later = defaultdict[int | None, list[float]](list), defaultdict[int | None, list[float]](list)
    seen: set[tuple[int | None, str]] = set()
    for turn in training:
        kind = later if (turn.stage, turn.client) in seen else first
        kind[turn.stage].append(turn.cpu_seconds)
        seen.add((turn.stage, turn.client))
    return first, later


def rounds_for_steps(client_steps: int, steps_a_round: int) -> int:
    """The number of rounds, at least 1, whose steps come nearest to ``client_steps``."""
    return max(round(client_steps / steps_a_round), 1)


def rounds_for(target: float, fixed: float, a_round: float, stages: int, usual: int) -> int:
    """The number of rounds that come nearest to spending ``target``.

    It is at least one for each stage, and at most 25 times ``usual``, the rounds at equal steps.
    """
    fewest, most, left = max(stages, 1), max(_LONGEST * usual, stages), target - fixed
    if left >= a_round * most:
        return most
    return max(round(left / a_round), fewest) if left > 0 else fewest


def points(rounds: int, count: int = 12) -> frozenset[int]:
    """The rounds, counted from 1, after which the stack is evaluated: about ``count`` of them, with the last one."""
    return frozenset(-(-rounds * place // count) for place in range(1, count + 1))


def reached(curve: Iterable[Point], target: float) -> Point | None:
    """The first point of a curve with a validation accuracy of ``target`` or more; None if there is none."""
    return next((point for point in curve if point[4] >= target), None)
