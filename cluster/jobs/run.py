"""Runs one job, from its record in the database to its model. A coordinator actor calls this; any process can."""

import logging
import traceback
from contextlib import closing
from time import sleep

from sqlalchemy.exc import OperationalError

from chainfed_ray.activity import Listener
from chainfed_ray.cluster.jobs.activity_record import ActivityRecord
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import ChainFedError, CoordinatorLost
from chainfed_ray.federation.evaluation import streamed
from chainfed_ray.federation.run import MakeEvaluation, MakePool, run_job
from chainfed_ray.record import Record
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import JobFinished, JobResult, JobStarted, Round
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job

_DEATHS = 5  # after this many deaths of its coordinator without a finished round, a job fails
_DATABASE_RETRY_SECONDS = 5.0

_log = logging.getLogger(__name__)


def run_queued_job(
    job: str,
    storage: Storage,
    make_pool: MakePool,
    make_evaluation: MakeEvaluation = streamed,
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
    make_pool: MakePool,
    make_evaluation: MakeEvaluation,
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
    make_pool: MakePool,
    make_evaluation: MakeEvaluation,
    listen: Listener,
) -> JobResult:
    folder, scratch = storage.job(job), storage.scratch(job)
    started: JobStarted | None = None
    records = run_job(spec, folder, pool=make_pool, evaluation=make_evaluation, scratch=scratch, listen=listen)
    with closing(records):
        for record in records:
            match record:
                case JobStarted():
                    started = record
                    _publish(store, job, "started", "started", record)
                case Round():
                    _publish(store, job, f"round-{record.index}", "round", record)
                case JobFinished():
                    assert started is not None, "the first record"
                    _publish(store, job, "finished", "finished", record)
                    return JobResult.of(spec.name, started, CommitLog(folder).rounds(), record)
    raise AssertionError("the last record is that of a job that has finished")


def _publish(store: JobStore, job: str, key: str, kind: str, record: Record) -> None:
    store.publish(job, key, kind, record.model_dump(mode="json"))
