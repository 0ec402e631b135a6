"""``chainfed run``: trains a job without a service, on a Ray cluster that this process starts."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Timer
from typing import NoReturn

import psutil
from rich.console import Console

from chainfed_ray.api.operator.answers import answer
from chainfed_ray.api.report.progress import ProgressDisplay
from chainfed_ray.cluster.offload.door import make_disk_evaluator
from chainfed_ray.cluster.pool.local import on_local_ray
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.errors import InvalidJob, JobFailed
from chainfed_ray.federation.evaluation import server_evaluation
from chainfed_ray.federation.run import run_job
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.result import JobResult
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round
from chainfed_ray.spec.job import JobSpec

_WORDS_SECONDS = 10.0  # to say why a run has ended


def folder_of(out: Path, spec: JobSpec) -> Path:
    """Make the job's folder in ``out``, and write the job's specification into it.

    A folder belongs to one specification: commits of one job must never be continued with the settings of another.

    Raises:
        InvalidJob: the folder holds a job with another specification.
    """
    folder = out / spec.name
    job_file = folder / "job.json"
    document = json.dumps(spec.document(), indent=2)
    if job_file.exists() and job_file.read_text() != document:
        raise InvalidJob.at("name", spec.name, f"a name not used in {out} yet: {folder} holds a different job")
    folder.mkdir(parents=True, exist_ok=True)
    partial = job_file.with_suffix(".partial")
    partial.write_text(document)
    partial.replace(job_file)  # atomic: a reader never sees half of it
    return folder


def train(
    spec: JobSpec, folder: Path, settings: Settings, progress: ProgressDisplay, as_json: bool = False
) -> tuple[JobStarted, list[Round], JobFinished, JobResult]:
    """Train a job, or the rest of it, and save its model in ``folder``. Where Ray hangs or ends, this process ends in words."""
    failed = partial(_end_at_once, spec.name, as_json)
    log = CommitLog(folder)
    done = len(log.rounds())
    memories = [group.memory for group in spec.fleet.clients]
    with on_local_ray(settings, progress.listen, memories, embedded=False, failed=failed) as pool:
        evaluation = partial(server_evaluation, on_disk=make_disk_evaluator)
        records = run_job(spec, folder, pool=pool, evaluation=evaluation, listen=progress.listen)
        with closing(records), _naming(folder):
            for record in records:
                match record:
                    case JobStarted():
                        progress.job_started(record)
                    case Round():
                        progress.round(record, resumed=record.index < done)
                    case JobFinished():
                        progress.job_finished(record)
    started, finished, rounds = log.job_started(), log.job_finished(), log.rounds()
    assert started is not None, "a job that ran to its end has started"
    assert finished is not None, "and finished"
    return started, rounds, finished, JobResult.of(spec.name, started, rounds, finished)


def _end_at_once(job: str, as_json: bool, reason: str) -> None:
    """End this process and all below it, since Ray has failed: another thread waits for it, and hears nothing any more.

    It says so, if anybody reads that: standard error may be closed, and a pipe may be full.
    """
    late = Timer(_WORDS_SECONDS, _kill_everything)
    late.daemon = True
    late.start()
    try:
        kept = f"{reason}; what was committed before is kept, and the same command goes on from there"
        error = JobFailed(job, "was ended", kept)
        with suppress(OSError, ValueError, AttributeError):
            Console(stderr=True).show_cursor()  # which is hidden while progress is shown
            sys.stderr.write(f"error: {error}\n")
            sys.stderr.flush()
        if as_json:
            answer(as_json, {"status": "failed", "error": error.document()})
    finally:
        _kill_everything()


def _kill_everything() -> NoReturn:
    try:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()
    finally:
        os._exit(1)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Name ``folder`` in an error of the disk that names no file, as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise
