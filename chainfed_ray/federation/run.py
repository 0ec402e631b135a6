"""One job from its specification to its finished model, as an iterator of records: the way in from Python (docs/python.md)."""

import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from pathlib import Path

from chainfed_ray.activity import Listener, Note, Notes, Reporter, no_listener
from chainfed_ray.aggregation.rule import AggregationRule
from chainfed_ray.client.objective import Objective
from chainfed_ray.client.pool import ClientPool, LocalPool
from chainfed_ray.data.partition import PartitionRule
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.federation.evaluation import ServerEvaluation, streamed
from chainfed_ray.federation.prepare import PlannedJob, prepare_job
from chainfed_ray.federation.start import StartRule
from chainfed_ray.model.source import ModelSource
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round
from chainfed_ray.spec.job import JobSpec

MakePool = Callable[[ModelSource, Note], ClientPool]
"""Makes the pool that runs the clients' turns; what it waits for, it may note."""

MakeEvaluation = Callable[[PlannedJob, Listener], ServerEvaluation]
"""Makes what evaluates stacks on the server."""


def in_this_process(source: ModelSource, note: Note) -> ClientPool:
    """A pool whose clients take their turns one after the other in this process, where a debugger finds them."""
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
    scratch: Path | None = None,
    listen: Listener = no_listener,
) -> Generator[JobStarted | Round | JobFinished, None, None]:
    """Run a job, and yield its records: ``JobStarted``, each ``Round``, ``JobFinished``.

    Commits and the finished model (``folder``/model) are written to ``folder``. A job that was stopped there continues with
    its next round, after its earlier records were yielded once more. To stop it, stop iterating. ``partition``, ``start``,
    ``aggregation`` and ``objective`` are rules of the caller's own. Clients keep their caches in ``scratch``, by default a
    temporary folder.

    Raises:
        InvalidJob: the job cannot run, or not with these rules.
        QuorumLost: too few clients answered.
        CorruptCommit: ``folder`` holds something else than this job's commits.
    """
    with ExitStack() as until_done:
        if scratch is None:
            scratch = Path(until_done.enter_context(tempfile.TemporaryDirectory(prefix="chainfed-")))
        job = prepare_job(spec, scratch, listen, partition)
        log, notes = CommitLog(folder), Notes(listen)
        clients = until_done.enter_context(closing(pool(job.base, notes.note)))
        server = until_done.enter_context(closing(evaluation(job, notes)))
        coordinator = Coordinator(
            job, clients, log, server, notes, aggregation=aggregation, start=start, objective=objective
        )
        yield coordinator.open()
        yield from log.rounds()
        yield from coordinator.rounds()
        finished = coordinator.finish()
        Reporter("saving the model", listen).begin()
        coordinator.save(folder)
    yield finished
