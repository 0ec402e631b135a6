"""Compares what a job would cost with each look-ahead, and with all layers in one window.

The job's own planner plans each of them. Nothing is timed for it: the times are those that were measured for the job itself,
with more or fewer layers and heads in a step.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

from chainfed_ray.budget.footprint import SavedActivations, layers_run
from chainfed_ray.budget.planner import TurnPlan
from chainfed_ray.chain import LookAhead, Window
from chainfed_ray.errors import InvalidJob
from chainfed_ray.planning.admission import Admission, Planner, admit, requirements_of
from chainfed_ray.planning.duration import PASSES, Duration, seconds_of_job, typical_clients, visits
from chainfed_ray.planning.pace import Pace
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.forecast import LookAheadForecast
from chainfed_ray.spec.parse import parse_job

_BOTH_WAYS = 2  # layer passes of a frozen layer in a step: forward, and the gradient of its input, which takes as long


def compared(job: PlannedJob, measured: Duration | None, at_once: int) -> Iterator[LookAheadForecast]:
    """What ``job`` costs with each look-ahead that it may have, and with a window of all layers; its own is among them.

    ``measured`` are the times of the job itself, of which ``at_once`` clients train at a time; without them none are told.
    """
    own = job.spec.chain.look_ahead
    for look_ahead in get_args(LookAhead):
        other = job if look_ahead == own else _other(job, {"look_ahead": look_ahead})
        if other:
            yield _forecast(job, other, measured, at_once)
    if job.window < job.layers:
        whole = _other(job, {"look_ahead": "exact", "window": job.layers, "slide": 1, "start": 0})
        if whole:
            yield _forecast(job, whole, measured, at_once)


def _other(job: PlannedJob, chain: Mapping[str, Any]) -> PlannedJob | None:
    """The job with other values in its section ``chain``; None if they contradict others. No part is traced again."""
    document = job.spec.document()
    for key in ("global_weight", "global_trains"):
        del document["chain"][key]  # of the global loss, which one look-ahead has: by default
    document["chain"] |= chain
    try:
        spec = parse_job(document)
    except InvalidJob:
        return None
    spec = spec.model_copy(update={"rounds": job.spec.rounds})  # a limit of ε may allow fewer than the document says
    planner = Planner(job.planner.costs, requirements_of(spec.chain, spec.rounds, spec.lowest_start(job.layers)))
    everybody = [candidate for candidate, _ in (*job.admission.admitted, *job.admission.excluded)]
    if spec.window(job.layers) < job.layers:
        return replace(job, spec=spec, planner=planner, admission=admit(planner, everybody, spec.window(job.layers)))
    # Who cannot hold all layers trains the upper ones. The window is not narrowed step by step for all, as ``admit`` does.
    plans = [(candidate, planner.plan(candidate, Window(0, job.layers - 1))) for candidate in everybody]
    admitted = tuple((candidate, plan) for candidate, plan in plans if plan)
    excluded = tuple((candidate, 0) for candidate, plan in plans if not plan)
    return replace(job, spec=spec, planner=planner, admission=Admission(admitted, excluded, job.layers))


def _forecast(job: PlannedJob, other: PlannedJob, measured: Duration | None, at_once: int) -> LookAheadForecast:
    """What ``other`` costs, by the times that were measured for ``job``."""
    admitted, planned = other.admission.admitted, dict[str, int]()
    for candidate, plan in admitted:
        most = max(plan.planned_bytes, plan.prefix.profile_bytes)
        planned[candidate.client_class] = max(most, planned.get(candidate.client_class, 0))
    seconds = None
    if measured and measured.evaluation and measured.paces and admitted:
        paces = measured.paces if other is job else _paces(job, other, measured)
        seconds = seconds_of_job(other, paces, measured.evaluation, at_once)
    return LookAheadForecast(
        look_ahead=other.spec.chain.look_ahead,
        window=other.window,
        own=other is job,
        joins=len(admitted),
        whole=sum(len(plan.window) == other.window for _, plan in admitted),
        layer_passes=_mean_passes(other),
        planned_bytes=planned,
        estimated_seconds=seconds,
    )


def _mean_passes(job: PlannedJob) -> float:
    """The layer passes of an example in a training step: the mean over the job's rounds and clients."""
    start = job.planner.requirements.start
    ways = Counter((plan.window.bottom - start, plan.activations) for _, plan in job.admission.admitted)
    passes = (
        clients * rounds * _passes(job, Window(window.bottom + narrower, window.top), activations)
        for (narrower, activations), clients in ways.items()
        for window, rounds in visits(job)
    )
    return sum(passes) / (ways.total() * job.spec.rounds.total) if ways else 0.0


def _passes(job: PlannedJob, window: Window, activations: SavedActivations) -> int:
    """The layer passes of an example in a step: one more for each layer that computes its activations again."""
    again = activations == "recomputed"
    return layers_run(job.planner.costs, job.planner.requirements, window) * (_BOTH_WAYS + again)


def _paces(job: PlannedJob, other: PlannedJob, measured: Duration) -> dict[str, Pace]:
    """The pace of each class in ``other``. A class that does not take part in ``job`` is as fast as its slowest one."""
    own, slowest = typical_clients(job), max(measured.paces, key=lambda name: measured.paces[name].step)
    assert measured.evaluation, "times were measured"
    head = measured.evaluation.row
    found = {}
    for name, (_, plan) in typical_clients(other).items():
        known = name if name in measured.paces else slowest
        pace, before = measured.paces[known], own[known][1]
        now, then = (_passes(each, way.window, way.activations) for each, way in ((other, plan), (job, before)))
        more = (now - then) * pace.layer
        more += PASSES * (_heads(other, plan) - _heads(job, before)) * head
        loaded = (_loaded(other, plan) - _loaded(job, before)) * pace.load
        found[name] = replace(pace, step=max(pace.step + more, 0.0), turn=max(pace.turn + loaded, 0.0))
    return found


def _heads(job: PlannedJob, plan: TurnPlan) -> int:
    """How many times a step runs the head: twice with a global loss."""
    return 2 if job.planner.requirements.global_branch and plan.window.top < job.layers - 1 else 1


def _loaded(job: PlannedJob, plan: TurnPlan) -> int:
    """The layers that a turn loads for its steps."""
    resident = plan.weights == "resident"
    return layers_run(job.planner.costs, job.planner.requirements, plan.window) if resident else 0
