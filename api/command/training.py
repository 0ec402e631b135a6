"""``chainfed run``: a job without a service, on a Ray cluster of this process alone."""

import json
import tempfile
from contextlib import closing
from pathlib import Path

from chainfed_ray.activity import Notes, Reporter
from chainfed_ray.api.report.progress import ProgressDisplay
from chainfed_ray.cluster.local_ray import local_ray
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.errors import InvalidJob
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.federation.prepare import prepare_job
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import JobFinished, JobResult, JobStarted, Round
from chainfed_ray.spec.job import JobSpec


def folder_of(out: Path, spec: JobSpec) -> Path:
    """The job's folder in ``out``; its commits belong to one specification and are never continued with another.

    Raises:
        InvalidJob: the folder holds another job.
    """
    folder = out / spec.name
    kept = folder / "job.json"
    document = json.dumps(spec.document(), indent=2)
    if kept.exists() and kept.read_text() != document:
        raise InvalidJob.at("name", spec.name, f"a name not used in {out} yet: {folder} holds a job that differs")
    folder.mkdir(parents=True, exist_ok=True)
    aside = kept.with_suffix(".partial")
    aside.write_text(document)
    aside.replace(kept)
    return folder


def train(
    spec: JobSpec, folder: Path, settings: Settings, progress: ProgressDisplay
) -> tuple[JobStarted, list[Round], JobFinished, JobResult]:
    """Train a job, or the rest of it, and save its model in ``folder``."""
    with tempfile.TemporaryDirectory(prefix="chainfed-") as scratch:
        job = prepare_job(spec, Path(scratch), progress.listen)
        log = CommitLog(folder)
        with local_ray(settings, {}, progress.listen):
            from chainfed_ray.cluster.offload.engine import judging  # not before: see local_ray
            from chainfed_ray.cluster.pool.ray_pool import RayPool

            notes = Notes(progress.listen)
            made = RayPool(job.base, settings.client_slots, notes.note)
            with closing(made) as pool, closing(judging(job, notes)) as judge:
                coordinator = Coordinator(job, pool, log, judge, notes)
                job_started, job_finished = _rounds(coordinator, log, progress)
        Reporter("saving the model", progress.listen).begin()
        coordinator.save(folder)
    rounds = log.rounds()
    return job_started, rounds, job_finished, JobResult.of(spec.name, job.classes, job_started, rounds, job_finished)


def _rounds(coordinator: Coordinator, log: CommitLog, progress: ProgressDisplay) -> tuple[JobStarted, JobFinished]:
    job_started = coordinator.open()
    progress.job_started(job_started)
    for record in log.rounds():
        progress.round(record, resumed=True)
    for record in coordinator.rounds():
        progress.round(record)
    job_finished = coordinator.finish()
    progress.job_finished(job_finished)
    return job_started, job_finished
