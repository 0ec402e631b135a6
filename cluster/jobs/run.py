"""Runs one job, from its record in the database to its model. A coordinator actor calls this; any process can."""

import logging
import traceback
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from errno import ENOTCONN
from pathlib import Path
from time import sleep
from typing import Any

from chainfed_ray.activity import Activity, Listener
from chainfed_ray.client.pool import MakePool, UnmetDemand
from chainfed_ray.client.survey import SurveyStopped
from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.cluster.draining import Drain
from chainfed_ray.cluster.files.artifacts import STACKS
from chainfed_ray.cluster.files.job_log import WITHHELD, JobLog
from chainfed_ray.cluster.files.upload_sources import rules_of_job
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.activity_record import ActivityRecord
from chainfed_ray.cluster.jobs.cleanup import clean_up, described, fail, note_bytes, pause
from chainfed_ray.cluster.jobs.commits import Commits, wait_for
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.occupancy import occupy
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.structured_logs import about
from chainfed_ray.cluster.tables import Event, JobRecord
from chainfed_ray.cluster.tracing import StagesAndRounds, asked_by, flush, span
from chainfed_ray.errors import CommitConflict, CorruptCommit, InvalidJob, JobNotFound
from chainfed_ray.export.cards import write_cards
from chainfed_ray.federation.evaluation import streamed
from chainfed_ray.federation.run import MakeEvaluation, run_job
from chainfed_ray.planning.sites import Sites
from chainfed_ray.reading import (
    EVERYTHING,
    NF4,
    OF_ABSENT_DISKS,
    OF_DISKS,
    OF_FULL_DISKS,
    HubAway,
    ReadingRules,
    reading_by,
    trouble_behind,
    try_its_disk,
    try_to_read,
)
from chainfed_ray.record import Record
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.first_cause import first_cause
from chainfed_ray.records.result import JobResult
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round
from chainfed_ray.records.states import AT_WORK
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job

_BROKEN_TRIES = 8  # after so many without a round in between, where no other trouble of the disk is seen, a job fails
_RETRY_SECONDS = 5.0  # until a database or a disk is asked again

_log = logging.getLogger(__name__)


def run_queued_job(
    job: str,
    storage: Storage,
    make_pool: MakePool,
    make_evaluation: MakeEvaluation = streamed,
    sites: Sites | None = None,
    rules: ReadingRules = EVERYTHING,
) -> None:
    """Run a job, or resume it from its commit log, and record how it ended. One that is to pause does so after
    a commit, and so does every job if the service drains.

    Events of rounds that were committed before are published if they are missing. If the database does not answer, or a disk
    is full or gone, be it ours or one from which the job reads, the job waits and then resumes: it never fails because of that.
    If only a file of the job's does not work, try after try, it fails: it would hold a place that others could have. The job
    reads by the ``rules``, as it was checked, and the uploads of its tenant. Of a job that is deleted there is nothing to do.
    """
    tries = broken = 0
    newest: Event | None = None
    while True:
        try:
            with closing(JobStore(storage.database, existing=True)) as store:
                if store.get(job).status == "pausing":
                    pause(job, store, storage)  # nothing of it runs now
                if store.get(job).status not in AT_WORK or Drain(storage.root).has_begun():
                    return
                record = store.get(job)
                queued = store.newest(job, "queued")
                asked = {name: str(value) for name, value in queued.data.items()} if queued else {}
                with (
                    asked_by(asked),
                    about(job=job, tenant=record.tenant),
                    reading_by(_rules_for(record, rules, storage)),
                ):
                    trouble = _run(job, store, storage, make_pool, make_evaluation, sites, asked)
                    if trouble is None:
                        continue
                    before, newest = newest, store.newest(job, "round")
                    stands = newest == before and _trouble_of_disks(storage, record.spec) is None
                    passes = trouble.errno in (*OF_FULL_DISKS, *OF_ABSENT_DISKS)
                    tries = tries + 1 if stands else 0
                    broken = broken + 1 if stands and not passes else 0
                    if broken >= _BROKEN_TRIES:
                        fail(job, trouble, store, storage)
                    else:
                        seconds = _RETRY_SECONDS * 2 ** max(min(tries, _BROKEN_TRIES - 1) - 1, 0)
                        _wait_for_disk(job, trouble, record.spec, store, storage, seconds)
        except JobNotFound:  # it was over, and was deleted at once
            return
        except NO_ANSWER as error:
            _log.warning("the database does not answer (%s); job %s waits for it", error, job)
            sleep(_RETRY_SECONDS)


def _rules_for(record: JobRecord, rules: ReadingRules, storage: Storage) -> ReadingRules:
    with closing(UploadStore(storage)) as uploads:
        return rules_of_job(rules, record.reads_anything, uploads.files, record.tenant, record.spec)


def _run(
    job: str,
    store: JobStore,
    storage: Storage,
    make_pool: MakePool,
    make_evaluation: MakeEvaluation,
    sites: Sites | None,
    asked: Mapping[str, str],
) -> OSError | None:
    """Run the job to its end, and record that; or until it is to pause. Returns the trouble of a disk, if there is one.

    Its spans are below that of the request which ``asked`` for it.
    """
    log, commits = JobLog(storage.job(job)), Commits(job, store, storage)
    document: Mapping[str, Any] = {}
    try:
        storage.check()
        document = store.get(job).spec
        if not document:
            raise InvalidJob.at(
                "(job)", document, "the document that was submitted; what the database has of it cannot be read"
            )
        spec = parse_job(document)
        try:
            with occupy(storage.job(job)), span("coordinator", asked):
                commits.begin()
                with log, ActivityRecord(store, job) as record:
                    listen = log.with_activities(record)
                    result = _train(job, spec, store, storage, make_pool, make_evaluation, sites, listen, log, commits)
        finally:
            flush()  # however it ended: this process may be ended as soon as that is recorded
    except NO_ANSWER:
        raise
    except CommitConflict as error:
        _log.warning("job %s: %s", job, error)
    except SurveyStopped as error:
        _log.info("%s", error)
    except Exception as error:  # whatever it is, it made the job fail, and belongs on the job's record
        behind = trouble_behind(error) or _trouble_of_disks(storage, document) or _trouble_of_files(document)
        if behind:
            return behind
        _log.error("job %s failed: %s", job, "".join(traceback.format_exception(error)), extra=WITHHELD)
        log.failed(error)
        cause = _cause(error, storage.job(job))
        with suppress(CommitConflict):
            commits.keep(is_last=True)
        _clean_up(job, store, storage)
        store.move(job, "failed", error={**described(error), "cause": cause})
    else:
        if result:
            # The status comes last: as soon as it is recorded, the controller may end this process.
            _clean_up(job, store, storage)
            store.move(job, "succeeded", result=result.model_dump(mode="json"))
    return None


def _clean_up(job: str, store: JobStore, storage: Storage) -> None:
    """Clean up after the job. An object store that is away is waited for: the secret of its noise must not stay there."""

    def once() -> None:
        trouble = clean_up(job, storage)
        if trouble and trouble.errno == ENOTCONN:
            raise trouble
        note_bytes(job, store, storage)

    wait_for(once, job, store)


def _trouble_of_disks(storage: Storage, document: Mapping[str, Any]) -> OSError | None:
    """The trouble of a disk that there is now: of ours, or of one with what a job reads by its ``document``."""
    try:
        storage.check()
    except OSError as trouble:
        return trouble
    return _trouble(document, try_its_disk)


def _trouble_of_files(document: Mapping[str, Any]) -> OSError | None:
    """The same of what the job reads itself. A client whose disk does not work sends no more than words, so it is tried."""
    return _trouble(document, try_to_read)


def _trouble(document: Mapping[str, Any], try_: Callable[[Path, bool], None]) -> OSError | None:
    sections = ((name, section) for name, section in document.items() if isinstance(section, dict))
    for name, source in ((name, source) for name, section in sections for source in section.values()):
        if not isinstance(source, str) or not source.startswith("path:"):
            continue
        try:
            try_(Path(source.removeprefix("path:").removesuffix(NF4)), name == "model")
        except OSError as trouble:
            if trouble.errno in OF_DISKS:
                trouble.filename = source
                return trouble
        except ValueError:  # no path at all
            continue
    return None


def _wait_for_disk(
    job: str, trouble: OSError, document: Mapping[str, Any], store: JobStore, storage: Storage, seconds: float
) -> None:
    """Wait for so long, and until the disks work again; or until a trouble that could be seen is gone, or the job is to stop.

    The job's caches, which may have filled a disk, are removed and made again later.
    """
    storage.clear_scratch(job)
    _log.warning("job %s waits: %s", job, trouble)
    seen, left = False, seconds
    while not _is_to_stop(job, store, storage):
        what = "the hub" if isinstance(trouble, HubAway) else "a disk"
        with suppress(*NO_ANSWER):  # the database may be on the same disk
            store.note_activity(job, Activity(what=f"waiting for {what}", note=str(trouble)))
        sleep(_RETRY_SECONDS)
        left -= _RETRY_SECONDS
        disks = _trouble_of_disks(storage, document)
        present = disks or _trouble_of_files(document)
        if disks is None and (left <= 0 or (seen and present is None)):
            return
        seen = seen or present is not None
        trouble = present or trouble


def _is_to_stop(job: str, store: JobStore, storage: Storage) -> bool:
    """Whether a job is to pause or to be cancelled, or the service drains."""
    with suppress(*NO_ANSWER):
        status = store.get(job).status
        return status == "pausing" or status not in AT_WORK or Drain(storage.root).has_begun()
    return False


def _train(
    job: str,
    spec: JobSpec,
    store: JobStore,
    storage: Storage,
    make_pool: MakePool,
    make_evaluation: MakeEvaluation,
    sites: Sites | None,
    listen: Listener,
    log: JobLog,
    commits: Commits,
) -> JobResult | None:
    """Train, and publish what is committed. None if it is to stop for now: its clients' processes have been told to end."""
    folder, scratch = storage.job(job), storage.scratch(job)
    started: JobStarted | None = None
    spans = StagesAndRounds(len(CommitLog(folder).rounds()))
    records = run_job(
        spec, folder, pool=make_pool, evaluation=make_evaluation, sites=sites, scratch=scratch, listen=listen
    )
    with closing(records), spans:
        while True:
            with about(**spans.upcoming):
                record = next(records)  # the last one is that of a job that has finished
            spans.told(record)
            log.tell(record)
            if isinstance(record, JobStarted) and spec.privacy and not CommitLog(folder).rounds():
                CommitLog(folder).secret()  # what is kept now has it, before an order is given that depends on it
            if isinstance(record, JobFinished):
                assert started is not None, "the first record"
                rounds = CommitLog(folder).rounds()
                write_cards((folder / name for name in STACKS), spec, started, rounds)
            commits.keep(record.index if isinstance(record, Round) else None, isinstance(record, JobFinished))
            match record:
                case JobStarted():
                    started = record
                    store.move(job, "running", before=("validating",))
                    _publish(store, job, "started", "started", record)
                case Round():
                    for site in record.late:
                        _publish(store, job, f"late-{site.client_class}", "late_site", site)
                    _publish(store, job, f"round-{record.index}", "round", record)
                case JobFinished():
                    assert started is not None, "the first record"
                    _publish(store, job, "finished", "finished", record)
                    return JobResult.of(spec.name, started, rounds, record)
            status = store.get(job).status
            if status == "pausing" or Drain(storage.root).has_begun():
                return None
            if status == "validating":  # it was to pause, and was resumed by who had not seen that it had started
                store.move(job, "running", before=("validating",))
            spans.begin_next()


def _cause(error: Exception, folder: Path) -> dict[str, Any]:
    """What first went wrong, as JSON. If the commits cannot be read, that is the error itself."""
    started, rounds = None, list[Round]()
    with suppress(OSError, CorruptCommit):
        log = CommitLog(folder)
        started, rounds = log.job_started(), log.rounds()
    return first_cause(error, started, rounds).model_dump(mode="json")


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
