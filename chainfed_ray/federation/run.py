"""Runs one job, from its specification to its finished model, as an iterator of records.

Call ``run_job`` from Python (docs/python.md); ``chainfed run`` and the service call it as well.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from chainfed_ray.activity import Listener, Note, Notes, Reporter, no_listener
from chainfed_ray.aggregation.rule import AggregationRule
from chainfed_ray.client.objective import Objective
from chainfed_ray.client.pool import ClientPool, LocalPool, MakePool
from chainfed_ray.data.partition import PartitionRule
from chainfed_ray.device.removal import temporary_folder
from chainfed_ray.errors import InvalidJob
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.federation.evaluation import FederatedEvaluation, JobEvaluation, streamed
from chainfed_ray.federation.start import StartRule
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.saved_stack import exit_folder, save_so_far, save_stack
from chainfed_ray.model.source import ModelSource
from chainfed_ray.planning.prepare import PlannedJob, prepare_job
from chainfed_ray.planning.sites import Sites
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.result import ExitScore
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round
from chainfed_ray.spec.job import JobSpec

MakeEvaluation = Callable[[PlannedJob, Listener], JobEvaluation]
"""Makes the object that evaluates stacks on the server."""


def in_this_process(source: ModelSource, note: Note) -> ClientPool:
    """A pool whose clients take their turns one after the other in this process, where a debugger can stop in them."""
    return LocalPool(source)


def run_job(
    spec: JobSpec,
    folder: Path,
    *,
    pool: MakePool = in_this_process,
    partition: PartitionRule | None = None,
    start: StartRule | None = None,
    aggregation: AggregationRule | None = None,
    objective: Objective | None = None,
    evaluation: MakeEvaluation = streamed,
    sites: Sites | None = None,
    scratch: Path | None = None,
    listen: Listener = no_listener,
) -> Generator[JobStarted | Round | JobFinished, None, None]:
    """Run a job, and yield its records: ``JobStarted``, each ``Round``, ``JobFinished``.

    ``folder`` holds the job's commits and at the end the finished model, in ``folder``/model. After each round, ``folder``/last
    has the newest stack, and ``folder``/best the one with the least held-out loss, if that is another; and ``folder``/exit-<n>
    has the early exit after n layers, if the round evaluated that. To stop the job, stop iterating.
    Run it again with the same folder: it yields the earlier records once more, and continues with the next round.

    ``partition``, ``start``, ``aggregation`` and ``objective`` are the caller's own rules, in place of those that the job
    names. ``pool`` and ``evaluation`` make what runs the clients' turns and what evaluates stacks. ``sites`` answer for clients
    whose rows are at a site; a service has them. Clients keep their caches in ``scratch``, by default a temporary folder.
    ``listen`` hears what the job is busy with.

    Raises:
        InvalidJob: the job cannot run, or not with these rules.
        QuorumLost: too few clients answered.
        CorruptCommit: a commit in ``folder`` was changed, or is not of this job.
    """
    for index, group in enumerate(spec.fleet.clients if sites is None else ()):
        if group.site is not None:
            expected = "no value outside of a service, which sites join with `chainfed join`"
            raise InvalidJob.at(f"fleet.clients[{index}].site", group.site, expected)
    with ExitStack() as until_done:
        if scratch is None:
            scratch = until_done.enter_context(temporary_folder("chainfed-"))
        job = prepare_job(spec, scratch, listen, partition, sites)
        if sites:
            sites.planned(job.planner.costs)
        log, notes = CommitLog(folder), Notes(listen)
        clients = until_done.enter_context(closing(pool(job.base, notes.note)))
        at_sites = spec.evaluation.rows == "sites"
        evaluator = FederatedEvaluation(job, clients, notes) if at_sites else evaluation(job, notes)
        server = until_done.enter_context(closing(evaluator))
        coordinator = Coordinator(
            job, clients, log, server, notes, aggregation=aggregation, start=start, objective=objective, sites=sites
        )
        yield coordinator.open()
        if history := log.rounds():
            # A process that was killed after a commit left the stacks of the round before.
            _save(job, coordinator, history[-1], folder)
            yield from history
        for record in coordinator.rounds():
            _save(job, coordinator, record, folder)
            yield record
        finished = coordinator.finish()
        Reporter("saving the model", listen).begin()
        coordinator.save(folder)
    yield finished


def _save(job: PlannedJob, coordinator: Coordinator, newest: Round, folder: Path) -> None:
    """Write the stacks that the job has after its ``newest`` round, and the early exit that this round evaluated."""
    save_so_far(coordinator.models(), folder)
    if score := ExitScore.after(newest, job.layers):
        stack: AdapterStack = coordinator.stack().up_to(score.layers - 1)
        save_stack(replace(job.saved(stack, score.round), run_layers=score.layers), exit_folder(folder, score.layers))
