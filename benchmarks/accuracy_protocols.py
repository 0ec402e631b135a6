"""What makes a comparison fair: how many rounds a method gets. Arithmetic only.

CPU seconds are those of the clients' processes in their turns. A run is fixed costs (profiles, the sums of a head in closed
form, the advance of prefix caches, each paid once however long the run is) and costs by client-step.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

PROTOCOLS = ("steps", "compute", "half-compute", "bytes", "target")

_LONGEST = 25  # times the rounds at equal steps: a probe costs next to nothing, and learns nothing more in the end

Point = tuple[int, float, int, float, float]
"""Client-steps, CPU seconds, bytes sent, seconds of the clients' turns, validation accuracy."""


class Spent(NamedTuple):
    """What one turn took; ``stage`` is the lowest layer of its stage's window, None for a turn that trained nothing."""

    client: str
    stage: int | None
    steps: int
    cpu_seconds: float
    sent_bytes: int


class Costs(NamedTuple):
    """What a run of any length takes; ``fixed`` is for all clients and stages."""

    fixed_cpu_seconds: float
    step_cpu_seconds: float
    fixed_bytes: int
    bytes_per_round: float


def costs(turns: Sequence[Spent], clients: int, rounds: int) -> Costs:
    """What is paid once, and what for each step, of a run of so many ``rounds`` with a fleet of so many ``clients``.

    The excess of a client's first turn in a stage over later ones is the advance of its cache, which each client pays once.
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
    """CPU seconds by stage: of clients' first turns in it, and of those that followed."""
    first, later = defaultdict[int | None, list[float]](list), defaultdict[int | None, list[float]](list)
    seen: set[tuple[int | None, str]] = set()
    for turn in training:
        kind = later if (turn.stage, turn.client) in seen else first
        kind[turn.stage].append(turn.cpu_seconds)
        seen.add((turn.stage, turn.client))
    return first, later


def rounds_for_steps(client_steps: int, steps_a_round: int) -> int:
    """The rounds that come nearest to ``client_steps``, one at least."""
    return max(round(client_steps / steps_a_round), 1)


def rounds_for(target: float, fixed: float, a_round: float, stages: int, usual: int) -> int:
    """The rounds that come nearest to spending ``target``: one a stage at least, and 25 times the ``usual`` at most."""
    fewest, most, left = max(stages, 1), max(_LONGEST * usual, stages), target - fixed
    if left >= a_round * most:
        return most
    return max(round(left / a_round), fewest) if left > 0 else fewest


def points(rounds: int, count: int = 12) -> frozenset[int]:
    """After which rounds, counted from 1, the stack is judged: about ``count`` times, and at the end."""
    return frozenset(-(-rounds * place // count) for place in range(1, count + 1))


def reached(curve: Iterable[Point], target: float) -> Point | None:
    """The first point of a run at which validation accuracy was ``target`` or more."""
    return next((point for point in curve if point[4] >= target), None)
