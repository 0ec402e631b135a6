"""Runs one job, from its record in the database to its model. A coordinator actor calls this; any process can."""

import logging
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from time import sleep

from sqlalchemy.exc import OperationalError

from chainfed_ray.activity import Listener, Note, Notes, Reporter
from chainfed_ray.cluster.jobs.activity_record import ActivityRecord
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import ChainFedError, CoordinatorLost
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.federation.evaluation import ServerEvaluation, streamed
from chainfed_ray.federation.pool import ClientPool
from chainfed_ray.federation.prepare import PlannedJob, prepare_job
from chainfed_ray.record import Record
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import JobResult
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job

_DEATHS = 5  # after this many deaths of its coordinator without a finished round, a job fails
_DATABASE_RETRY_SECONDS = 5.0

_log = logging.getLogger(__name__)


def run_job(
    job: str,
    storage: Storage,
    make_pool: Callable[[PlannedJob, Note], ClientPool],
    make_evaluation: Callable[[PlannedJob, Listener], ServerEvaluation] = streamed,
) -> None:
    """Run a job, or resume it from its commit log, and record how it ended.

    Events of rounds that were committed before are published if they are missing. If the database does not answer, the job
    waits and then resumes: it never fails because of that.
    """
    while True:
        try:
            store = JobStore(storage.database)
            try:
                _run(job, store, storage, make_pool, make_evaluation)
            finally:
                store.close()
            return
        except OperationalError as error:
            _log.warning("the database does not answer (%s); job %s waits for it", error, job)
            sleep(_DATABASE_RETRY_SECONDS)


def _run(
    job: str,
    store: JobStore,
    storage: Storage,
    make_pool: Callable[[PlannedJob, Note], ClientPool],
    make_evaluation: Callable[[PlannedJob, Listener], ServerEvaluation],
) -> None:
    record = store.get(job)
    if record.status != "running":
        return
    deaths = store.count_start(job) - 1
    try:
        if deaths >= _DEATHS:
            raise CoordinatorLost(job, deaths)
        with ActivityRecord(store, job) as listen:
            result = _train(job, parse_job(record.spec), store, storage, make_pool, make_evaluation, listen)
    except OperationalError:
        raise
    except Exception as error:  # whatever it is, it made the job fail, and belongs on the job's record
        _log.error("job %s failed: %s", job, "".join(traceback.format_exception(error)))
        storage.clear_scratch(job)
        CommitLog(storage.job(job)).erase_secret()
        document = (
            error.document()
            if isinstance(error, ChainFedError)
            else {"type": type(error).__name__, "message": str(error)}
        )
        store.move(job, "failed", error=document)
    else:
        # The status comes last: as soon as it is recorded, the controller may end this process.
        storage.clear_scratch(job)
        store.move(job, "succeeded", result=result.model_dump(mode="json"))


def _train(
    job: str,
    spec: JobSpec,
    store: JobStore,
    storage: Storage,
    make_pool: Callable[[PlannedJob, Note], ClientPool],
    make_evaluation: Callable[[PlannedJob, Listener], ServerEvaluation],
    listen: Listener,
) -> JobResult:
    planned = prepare_job(spec, storage.scratch(job), listen)
    log = CommitLog(storage.job(job))
    listen = notes = Notes(listen)
    with ExitStack() as resources:
        pool, evaluation = make_pool(planned, notes.note), make_evaluation(planned, listen)
        for resource in (pool, evaluation):
            resources.callback(resource.close)
        coordinator = Coordinator(planned, pool, log, evaluation, listen)
        job_started = coordinator.open()
        _publish(store, job, "started", "started", job_started)
        for record in log.rounds():
            _publish(store, job, f"round-{record.index}", "round", record)
        for record in coordinator.rounds():
            _publish(store, job, f"round-{record.index}", "round", record)
        job_finished = coordinator.finish()
        _publish(store, job, "finished", "finished", job_finished)
        result = JobResult.of(spec.name, planned.classes, job_started, log.rounds(), job_finished)
        Reporter("saving the model", listen).begin()
        coordinator.save(storage.job(job))
        return result


def _publish(store: JobStore, job: str, key: str, kind: str, record: Record) -> None:
    store.publish(job, key, kind, record.model_dump(mode="json"))
