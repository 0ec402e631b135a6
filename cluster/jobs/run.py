"""Runs one job, from its record in the database to its model. A coordinator actor calls this; any process can."""

import logging
import traceback
from contextlib import closing, suppress
from time import sleep

from chainfed_ray.activity import Activity, Listener
from chainfed_ray.client.pool import UnmetDemand
from chainfed_ray.client.survey import Sites
from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.cluster.jobs.activity_record import ActivityRecord
from chainfed_ray.cluster.jobs.cleanup import OF_DISKS, clean_up, described
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.occupancy import occupy
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import CoordinatorLost
from chainfed_ray.federation.evaluation import streamed
from chainfed_ray.federation.run import MakeEvaluation, MakePool, run_job
from chainfed_ray.reading import EVERYTHING, ReadingRules, reading_by
from chainfed_ray.record import Record
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import JobFinished, JobResult, JobStarted, Round
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job

_DEATHS = 5  # after this many deaths of its coordinator without a finished round, a job fails
_RETRY_SECONDS = 5.0  # until a database, or a disk, is asked again

_log = logging.getLogger(__name__)


def run_queued_job(
    job: str,
    storage: Storage,
    make_pool: MakePool,
    make_evaluation: MakeEvaluation = streamed,
    sites: Sites | None = None,
    restarted: bool = False,
    rules: ReadingRules = EVERYTHING,
) -> None:
    """Run a job, or resume it from its commit log, and record how it ended.

    Events of rounds that were committed before are published if they are missing. If the database does not answer, or a disk
    is full or gone, the job waits and then resumes: it never fails because of that. ``restarted`` says that Ray started this
    process in place of one that died. A job that resumes with the whole service is no sign that it kills its coordinators.
    The job reads by the ``rules``, as it was checked.
    """
    while True:
        try:
            with closing(JobStore(storage.database, existing=True)) as store:
                if store.get(job).status != "running":
                    return
                deaths = store.count_restart(job) if restarted else 0
                restarted = False  # from here on it is this process that tries again
                with reading_by(rules if store.get(job).reads_anything else rules.closed()):
                    trouble = _run(job, deaths, store, storage, make_pool, make_evaluation, sites)
                if trouble is None:
                    return
                _wait_for_disk(job, trouble, store, storage)
        except NO_ANSWER as error:
            _log.warning("the database does not answer (%s); job %s waits for it", error, job)
            sleep(_RETRY_SECONDS)


def _run(
    job: str,
    deaths: int,
    store: JobStore,
    storage: Storage,
    make_pool: MakePool,
    make_evaluation: MakeEvaluation,
    sites: Sites | None,
) -> OSError | None:
    """Run the job to its end, and record that. Returns the trouble of a disk instead, if there is one."""
    try:
        if deaths >= _DEATHS:
            raise CoordinatorLost(job, deaths)
        storage.check()
        spec = parse_job(store.get(job).spec)
        with occupy(storage.job(job)), ActivityRecord(store, job) as listen:
            result = _train(job, spec, store, storage, make_pool, make_evaluation, sites, listen)
    except NO_ANSWER:
        raise
    except Exception as error:  # whatever it is, it made the job fail, and belongs on the job's record
        if trouble := _disk_trouble(error, storage):
            return trouble
        _log.error("job %s failed: %s", job, "".join(traceback.format_exception(error)))
        clean_up(job, storage)
        store.move(job, "failed", error=described(error))
    else:
        # The status comes last: as soon as it is recorded, the controller may end this process.
        clean_up(job, storage)
        store.move(job, "succeeded", result=result.model_dump(mode="json"))
    return None


def _disk_trouble(error: BaseException, storage: Storage) -> OSError | None:
    """The trouble of a disk that is behind ``error``, or that there is now; None if every disk works.

    A client whose disk is full sends no more than words, so the disks are also tried.
    """
    behind: BaseException | None = error
    while behind:
        if isinstance(behind, OSError) and behind.errno in OF_DISKS:
            return behind
        behind = behind.__cause__ or behind.__context__
    return _present_trouble(storage)


def _present_trouble(storage: Storage) -> OSError | None:
    try:
        storage.check()
    except OSError as trouble:
        return trouble
    return None


def _wait_for_disk(job: str, trouble: OSError, store: JobStore, storage: Storage) -> None:
    """Wait until the disks work again. The job's caches, which may have filled one, are removed and made again later."""
    storage.clear_scratch(job)
    waiting: OSError | None = trouble
    while waiting:
        _log.warning("job %s waits for a disk: %s", job, waiting)
        with suppress(*NO_ANSWER):  # the database may be on the same disk
            store.note_activity(job, Activity(what="waiting for a disk", note=str(waiting)))
        sleep(_RETRY_SECONDS)
        waiting = _present_trouble(storage)


def _train(
    job: str,
    spec: JobSpec,
    store: JobStore,
    storage: Storage,
    make_pool: MakePool,
    make_evaluation: MakeEvaluation,
    sites: Sites | None,
    listen: Listener,
) -> JobResult:
    folder, scratch = storage.job(job), storage.scratch(job)
    started: JobStarted | None = None
    records = run_job(
        spec, folder, pool=make_pool, evaluation=make_evaluation, sites=sites, scratch=scratch, listen=listen
    )
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


def publish_unmet(job: str, storage: Storage, demand: UnmetDemand) -> None:
    """Publish that the cluster never has room for a class of clients. It is on the record of each round as well."""
    data = demand.model_dump(mode="json") | {"reason": demand.reason}
    try:
        with closing(JobStore(storage.database, existing=True)) as store:
            store.publish(job, f"no-machine-{demand.client_class}", "no_machine", data)
    except NO_ANSWER as error:
        _log.warning("the database does not answer (%s); it was not told that %s", error, demand.reason)


def _publish(store: JobStore, job: str, key: str, kind: str, record: Record) -> None:
    store.publish(job, key, kind, record.model_dump(mode="json"))
