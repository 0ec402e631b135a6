"""Estimates how long a job takes on this machine, from the times measured for a few examples (pace.py).

A turn's time has one part that grows with its examples and one that does not. The estimate adds up both over all rounds. It
does not foresee stages that converge early or clients that do not answer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.budget.planner import TurnPlan
from chainfed_ray.chain import Chain, Window
from chainfed_ray.client.messages import Client, Training
from chainfed_ray.client.profiling import FEWEST_FOR_CKA
from chainfed_ray.planning.candidates import Candidate, as_client
from chainfed_ray.planning.pace import EvaluationPace, Pace, evaluation_pace, training_pace
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.seeds import derive
from chainfed_ray.spec.sections import Often, RoundsSpec

PASSES = 3  # a training step takes about three forward passes: forward, gradients of inputs, gradients of weights


@dataclass(frozen=True)
class Duration:
    """The estimated duration of a job, and what was measured for it."""

    seconds: float  # of the whole job
    micro_steps: Mapping[str, float]  # seconds of one micro-batch, forward and backward, for each class that takes part
    paces: Mapping[str, Pace] = field(default_factory=dict)  # of each class that takes part
    evaluation: EvaluationPace | None = None


def duration(job: PlannedJob, at_once: int, listen: Listener = no_listener) -> Duration:
    """Estimate how long ``job`` takes if ``at_once`` clients train at a time. The job has at least one client."""
    Reporter("timing an evaluation", listen).begin()
    evaluation = evaluation_pace(job.base, job.validation, job.new_stack(range(job.layers), job.spec.seed), job.window)
    typical = typical_clients(job)
    paces = _paces(job, typical, Reporter("timing turns of each class", listen))
    micro_steps = {
        name: paces[name].step * min(plan.micro_batch, candidate.counts.examples) / candidate.speed
        for name, (candidate, plan) in typical.items()
    }
    return Duration(seconds_of_job(job, paces, evaluation, at_once), micro_steps, paces, evaluation)


def seconds_of_job(job: PlannedJob, paces: Mapping[str, Pace], evaluation: EvaluationPace, at_once: int) -> float:
    """The seconds that ``job`` takes if each class of clients works at its pace, ``at_once`` clients at a time."""
    return _rounds(job, paces, at_once) + evaluation_seconds(job, evaluation)


def typical_clients(job: PlannedJob) -> dict[str, tuple[Candidate, TurnPlan]]:
    """For each class that takes part, its client with the median number of examples, and its plan."""
    return {name: _median(members) for name, members in _by_class(job).items()}


def _by_class(job: PlannedJob) -> dict[str, list[tuple[Candidate, TurnPlan]]]:
    classes: dict[str, list[tuple[Candidate, TurnPlan]]] = {}
    for candidate, plan in job.admitted:
        classes.setdefault(candidate.client_class, []).append((candidate, plan))
    return classes


def _median(members: list[tuple[Candidate, TurnPlan]]) -> tuple[Candidate, TurnPlan]:
    """The client with the median number of examples, and its plan."""
    return sorted(members, key=lambda member: len(member[0].examples))[len(members) // 2]


def _paces(job: PlannedJob, typical: Mapping[str, tuple[Candidate, TurnPlan]], reporter: Reporter) -> dict[str, Pace]:
    """The pace of each class, measured on its typical client. Classes with the same plan share one measurement."""
    measured: dict[tuple[object, ...], Pace] = {}
    paces = {}
    for name, (candidate, plan) in reporter.each(typical.items(), len(typical), "classes"):
        settings = (
            plan.window,
            plan.rank,
            plan.micro_batch,
            plan.weights,
            plan.activations,
            plan.prefix.batch,
            plan.prefix.weights,
        )
        if settings not in measured:
            measured[settings] = pace_of(job, as_client(candidate, plan, plan.planned_bytes))
        paces[name] = measured[settings]
    return paces


def pace_of(job: PlannedJob, client: Client) -> Pace:
    """The pace of a client. It is timed with the window at the bottom of the model, where no layers below have to run first."""
    spec, plan = job.spec, client.plan
    window = Window(0, len(plan.window) - 1)
    order = Training(
        job.new_stack(range(job.layers - plan.window.bottom), job.spec.seed).tensors(),
        window,
        _chain(job).exit(plan.window) - plan.window.bottom,
        epochs=1,
        batch_size=spec.rounds.batch_size,
        learning_rate=spec.rounds.learning_rate,
        head_learning_rate=spec.rounds.head_learning_rate,
        global_weight=spec.chain.stand_in_weight,
        global_trains=spec.chain.global_trains,
        seed=derive(spec.seed, "pace"),
    )
    return training_pace(job.base, replace(client, plan=replace(plan, window=window)), order)


def _rounds(job: PlannedJob, paces: Mapping[str, Pace], at_once: int) -> float:
    """The seconds of the clients' work in all rounds.

    A round runs its turns ``at_once`` at a time, and takes at least as long as its longest turn. No turn takes longer than the
    deadline. The work that each client does once in the job, such as making its prefix cache, is added.
    """
    rounds, clients = job.spec.rounds, len(job.admitted)
    cohort = min(rounds.clients, clients)
    turns: list[float] = []
    once = 0.0
    for candidate, plan in job.admitted:
        pace, examples = paces[candidate.client_class], candidate.counts.examples
        in_each_turn, _ = _layers_below(job, plan, examples)
        step = pace.step * _run_of(job, plan)
        turn = pace.turn + _trained_on(rounds, examples) * step + _through(in_each_turn, examples, plan, pace)
        turns.append(min(turn / candidate.speed, rounds.deadline))
        once += _once(job, plan, pace, examples) / candidate.speed
    # The share of clients that take a turn at all. For a fitted head, all do.
    seen = 1 if _fits(job) else min(1, rounds.total * cohort / clients)
    in_turn = math.ceil(cohort / at_once) * sum(turns) / clients
    return rounds.total * max(in_turn, _longest(turns, cohort)) + seen * once / min(at_once, clients)


def _run_of(job: PlannedJob, plan: TurnPlan) -> float:
    """The layers that an average step of the job runs, as a share of those that a step of ``plan`` runs.

    With an exact look-ahead a step of the lowest window, for which the plan is, runs the most.
    """
    chain, windows = _chain(job), visits(job)
    narrower, total = plan.window.bottom - chain.start, job.spec.rounds.total
    # Each layer runs with its adapter; the bottom layer does not run, but its adapter does.
    planned = chain.exit(plan.window) - plan.window.bottom + 1
    return sum(rounds * (chain.exit(window) - window.bottom - narrower + 1) for window, rounds in windows) / (
        total * planned
    )


def _chain(job: PlannedJob) -> Chain:
    return job.chain_from(job.planner.requirements.start)


def visits(job: PlannedJob) -> list[tuple[Window, int]]:
    """The windows of the job, each with the rounds that it has if no stage ends early."""
    chain, rounds = _chain(job), job.spec.rounds
    cyclic = job.spec.chain.schedule == "cyclic"
    stages = chain.cycled(rounds.total) if cyclic else chain.staged(rounds.total, rounds.last_stage_share)
    return [(stage.window, stage.rounds) for stage in stages]


def _once(job: PlannedJob, plan: TurnPlan, pace: Pace, examples: int) -> float:
    """The seconds of what a client does once in the job: its profile, its sums for each fitted head, its first prefix cache."""
    fits, cached = _fits(job), plan.prefix.cached
    profiles = job.spec.chain.start == "auto" and cached and examples >= FEWEST_FOR_CKA
    exits = layers_of_exits(job, cached)
    searched = len(Chain(job.layers, 0, job.window).windows) if exits else 0
    turns = (fits + profiles + searched) * pace.turn
    _, prefix = _layers_below(job, plan, examples)
    window = examples * pace.step / PASSES
    if not fits:
        profiled = min(examples, job.spec.chain.profile_examples) if profiles else 0
        return turns + _through(job.layers, profiled, plan, pace) + _through(prefix, examples, plan, pace)
    if not cached:
        return turns + fits * window + _through(exits + _below_all_stages(job, plan), examples, plan, pace)
    # A single pass gives the profile, the sums for the first head and the prefix (first_pass.py). After a search for the best
    # exit, the prefix needs a pass of its own.
    start = job.planner.requirements.start
    first = job.layers if profiles or exits else _chain(job).exit(_chain(job).windows[0]) + 1
    further = prefix if exits else prefix - (start + 1)
    return turns + (fits - 1) * window + _through(first + further, examples, plan, pace)


def _below_all_stages(job: PlannedJob, plan: TurnPlan) -> int:
    """The number of layers that a client without a cache runs its examples through for the heads of all stages."""
    narrower = plan.window.bottom - job.planner.requirements.start
    return sum(window.bottom + narrower + 1 for window, _ in visits(job)[: _fits(job)])


def _through(layers: float, examples: int, plan: TurnPlan, pace: Pace) -> float:
    """The seconds to run ``examples`` through ``layers``. Without a cache, each micro-batch reads every layer anew."""
    loads = 1 if plan.prefix.cached else math.ceil(examples / plan.micro_batch)
    return layers * (loads * pace.load + examples * pace.layer)


def _fits(job: PlannedJob) -> int:
    """The number of heads that the job fits in closed form, each to the examples of all clients."""
    if job.spec.chain.head != "fitted":
        return 0
    return 1 if job.spec.chain.look_ahead == "exact" else _stages(job)


def layers_of_exits(job: PlannedJob, cached: bool) -> int:
    """The number of layers that a client runs its examples through in the search for the best exit (``best-exit``)."""
    windows = Chain(job.layers, 0, job.window).windows
    if job.spec.chain.start != "best-exit" or len(windows) == 1:
        return 0
    if cached:
        return job.layers
    return sum(window.top + 1 for window in windows)


def _stages(job: PlannedJob) -> int:
    """The number of stages: at most one for each round, and a single one with the schedule ``cyclic``."""
    if job.spec.chain.schedule == "cyclic":
        return 1
    return len(visits(job))


def _longest(turns: Sequence[float], cohort: int) -> float:
    """The expected longest turn of a round, for ``cohort`` of the ``turns`` drawn without replacement."""
    mean, rest = 0.0, 1.0  # ``rest`` is the probability that no longer turn was drawn
    for place, turn in enumerate(sorted(turns, reverse=True)[: len(turns) - cohort + 1]):
        drawn = cohort / (len(turns) - place)
        mean += rest * drawn * turn
        rest *= 1 - drawn
    return mean


def _trained_on(rounds: RoundsSpec, examples: int) -> int:
    """The number of examples in a turn's optimizer steps. An example counts each time that a step uses it."""
    if rounds.local_steps is None:
        return rounds.local_epochs * examples
    passes, rest = divmod(rounds.local_steps, math.ceil(examples / rounds.batch_size))
    return passes * examples + rest * rounds.batch_size


def _layers_below(job: PlannedJob, plan: TurnPlan, examples: int) -> tuple[float, int]:
    """How many layers below the window a client runs its examples through: per turn, and once in the job."""
    spec, chain = job.spec, _chain(job)
    start, seen = chain.start, visits(job)
    # Clients with wider windows train the adapters in between, so the output there changes in each round.
    narrower = plan.window.bottom - start
    mean = sum(rounds * window.bottom for window, rounds in seen) / spec.rounds.total
    if spec.chain.schedule == "cyclic":
        highest = start
    elif chain.direction == "down":  # each slide runs the layers from the chain's start on again
        highest = sum(window.bottom - start for window, _ in seen) + start
    else:
        highest = seen[-1][0].bottom
    if not plan.prefix.cached:
        passes = _trained_on(spec.rounds, examples) / examples
        return passes * (mean + narrower + 1), 0
    slides = mean - start if spec.chain.schedule == "cyclic" else 0
    return narrower + slides, highest + 1


def evaluation_seconds(job: PlannedJob, pace: EvaluationPace) -> float:
    """The seconds of the server's evaluations: early exits and the whole model on validation rows, and the test rows once."""
    spec, chain = job.spec, _chain(job)
    inside = sum(rounds * (chain.exit(window) - window.bottom) for window, rounds in visits(job)) / spec.rounds.total
    early = pace.setup + inside * pace.load + len(job.validation) * (inside * pace.layer + pace.row)
    exits, whole = (times(job, often) for often in (spec.evaluation.every, spec.evaluation.whole_every))
    rows = whole * len(job.validation) + len(job.test)
    loading = (whole + 1) * (pace.setup + job.layers * pace.load)
    return exits * early + loading + rows * (job.layers * pace.layer + pace.row)


def times(job: PlannedJob, often: Often | Literal["never"]) -> int:
    """How many times in the job something happens that is due as ``often``: each stage, each round, or every n rounds."""
    total = job.spec.rounds.total
    if isinstance(often, int):
        return math.ceil(total / often)
    return {"round": total, "stage": _stages(job), "never": 0}[often]
