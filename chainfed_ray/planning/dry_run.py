"""The dry run: it forecasts who can take part in a job and what the job would cost, without training anything.

The job's own planner says who takes part, and with which plan. What a change of the job would gain is in changes.py, and
duration.py measures how long it takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.budget.planner import TurnPlan
from chainfed_ray.client.head_sums import ClassSums
from chainfed_ray.errors import InvalidJob
from chainfed_ray.planning.accountant import Ledger
from chainfed_ray.planning.candidates import Candidate
from chainfed_ray.planning.changes import changes
from chainfed_ray.planning.duration import duration
from chainfed_ray.planning.look_aheads import compared
from chainfed_ray.planning.prepare import PlannedJob, check_fleet, plan_job
from chainfed_ray.records.forecast import PREFIX, ClassForecast, Forecast
from chainfed_ray.spec.fleet import ClientClass
from chainfed_ray.spec.job import JobSpec


def dry_run(spec: JobSpec, at_once: int, listen: Listener = no_listener) -> Forecast:
    """Forecast a job of which ``at_once`` clients train at a time.

    Raises:
        InvalidJob: the job cannot run with any clients.
    """
    for index, group in enumerate(spec.fleet.clients):
        if group.site is not None:
            expected = "no value in a dry run, which knows nothing of the rows at sites; a job asks them when it starts"
            raise InvalidJob.at(f"fleet.clients[{index}].site", group.site, expected)
    job = plan_job(spec, Path(), listen)  # the folder is never used: measurements have their own
    ledger = Ledger(spec.privacy, spec.rounds, len(job.admitted)) if spec.privacy and job.admitted else None
    rounds = ledger.total if ledger else spec.rounds.total
    limited = _of_rounds(job, rounds) if rounds else job
    measured = duration(limited, at_once, listen) if job.admitted and rounds else None
    cohort = min(spec.rounds.clients, len(job.admitted))
    memory, start = job.planner.costs, job.planner.requirements.start
    Reporter("looking for changes that would let more clients join", listen).begin()
    return Forecast(
        job=spec.name,
        base=spec.model.base,
        layers=job.layers,
        start=spec.chain.start,
        window=job.window,
        clients=len(job.admitted) + len(job.admission.excluded),
        joins=len(job.admitted),
        quorum=spec.quorum,
        refused=_refused(job),
        rounds=rounds,
        stopped=ledger.stopped() if ledger else None,
        clients_per_round=cohort,
        sent_bytes_per_round=_sent_in_a_round(job, cohort),
        head_sums_bytes=_head_sums_bytes(job),
        received_bytes=(job.layers - start) * memory.adapter + memory.head,
        exits_bytes=_exits_bytes(job),
        estimated_seconds=measured.seconds if measured else None,
        classes=_classes(job, measured.micro_steps if measured else {}),
        changes=tuple(changes(job)),
        look_aheads=tuple(compared(limited, measured, at_once)),
    )


def _refused(job: PlannedJob) -> str | None:
    try:
        check_fleet(job)
    except InvalidJob as error:
        return str(error)
    return None


def _planned_bytes(plan: TurnPlan) -> int:
    """The most memory of any of a client's turns, the turn that profiles the layers included."""
    return max(plan.planned_bytes, plan.prefix.profile_bytes)


def _of_rounds(job: PlannedJob, total: int) -> PlannedJob:
    """The job with ``total`` rounds. It is not checked again, since its warmup, for one, may be longer than that."""
    rounds = job.spec.rounds.model_copy(update={"total": total})
    return replace(job, spec=job.spec.model_copy(update={"rounds": rounds}))


def _sent_bytes(job: PlannedJob, plan: TurnPlan) -> int:
    """The bytes that a client sends in a turn: the tensors that it trains, which are those with gradients.

    A client that adds its own noise sends all tensors of the stage.
    """
    noisy = job.spec.privacy is not None and job.spec.privacy.where == "client"
    not_trained = (job.window - len(plan.window)) * job.planner.costs.adapter if noisy else 0
    return plan.footprint.gradients + not_trained


def _sent_in_a_round(job: PlannedJob, cohort: int) -> int:
    """The bytes that a round's clients send together: the average over samples, and over who answers."""
    answers = sum(candidate.availability * _sent_bytes(job, plan) for candidate, plan in job.admitted)
    return int(answers * cohort / len(job.admitted)) if job.admitted else 0


def _head_sums_bytes(job: PlannedJob) -> int:
    if job.spec.chain.head != "fitted" or job.class_count is None or not job.admitted:
        return 0
    with torch.device("meta"):  # shapes only, no memory
        sums = ClassSums.zeros(job.class_count, job.head_layers * job.hidden).tensors()
    return sum(tensor.nbytes for tensor in sums.values())


def _exits_bytes(job: PlannedJob) -> int:
    """What early exits take: of each layer at which a window ends, the adapters up to there and, for a classifier, a head."""
    if job.spec.evaluation.every == "never":
        return 0
    start, costs = job.planner.requirements.start, job.planner.costs
    chain = job.chain_from(start)
    tops = {chain.exit(window) for window in chain.windows} - {job.layers - 1}  # that one is the model's end
    return sum((top + 1 - start) * costs.adapter + costs.head for top in tops)


def _classes(job: PlannedJob, micro_steps: Mapping[str, float]) -> tuple[ClassForecast, ...]:
    joining: dict[str, list[tuple[Candidate, TurnPlan]]] = {}
    missing: dict[str, list[tuple[Candidate, int]]] = {}
    for candidate, plan in job.admission.admitted:
        joining.setdefault(candidate.client_class, []).append((candidate, plan))
    for candidate, shortfall in job.admission.excluded:
        missing.setdefault(candidate.client_class, []).append((candidate, shortfall))
    groups = sorted(job.spec.fleet.clients, key=lambda group: (group.memory, group.name))
    return tuple(
        _class(job, group, joining.get(group.name, []), missing.get(group.name, []), micro_steps.get(group.name))
        for group in groups
    )


def _class(
    job: PlannedJob,
    group: ClientClass,
    joining: Sequence[tuple[Candidate, TurnPlan]],
    missing: Sequence[tuple[Candidate, int]],
    micro_step: float | None,
) -> ClassForecast:
    planned = joining or [_with_enough(job, candidate, shortfall) for candidate, shortfall in missing]
    plans = [plan for _, plan in planned]
    largest = max(plans, key=_planned_bytes)
    widths, micro_batches = [len(plan.window) for plan in plans], [plan.micro_batch for plan in plans]
    return ClassForecast(
        name=group.name,
        clients=group.count,
        joins=len(joining),
        excluded=len(missing),
        shortfall_bytes=max((shortfall for _, shortfall in missing), default=0),
        budget_bytes=group.memory,
        planned_bytes=_planned_bytes(largest),
        parts=largest.footprint.parts() | {PREFIX: _planned_bytes(largest) - largest.footprint.total},
        window=(min(widths), max(widths)),
        micro_batch=(min(micro_batches), max(micro_batches)),
        weights=tuple(sorted({plan.weights for plan in plans})),
        activations_offloaded=sum(plan.activations == "offloaded" for _, plan in joining),
        activations_recomputed=sum(plan.activations == "recomputed" for _, plan in joining),
        cached=sum(plan.prefix.cached for _, plan in joining),
        disk_bytes=max(job.planner.disk_bytes(candidate, plan) for candidate, plan in planned),
        sent_bytes=max(_sent_bytes(job, plan) for plan in plans),
        micro_step_seconds=micro_step,
    )


def _with_enough(job: PlannedJob, candidate: Candidate, shortfall: int) -> tuple[Candidate, TurnPlan]:
    """The plan that an excluded client would get with ``shortfall`` more bytes."""
    enough = replace(candidate, memory=candidate.memory + shortfall)
    plan = job.planner.plan(enough, job.chain_from(job.planner.requirements.start).lowest)
    assert plan, "the shortfall is the memory that a plan needs"
    return enough, plan
