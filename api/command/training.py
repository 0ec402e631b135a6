"""``chainfed run``: trains a job without a service, on a Ray cluster that this process starts."""

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
    spec: JobSpec, folder: Path, settings: Settings, progress: ProgressDisplay
) -> tuple[JobStarted, list[Round], JobFinished, JobResult]:
    """Train a job, or resume it from the commits in ``folder``, and save its model there. Returns the job's records."""
    with tempfile.TemporaryDirectory(prefix="chainfed-") as scratch:
        job = prepare_job(spec, Path(scratch), progress.listen)
        log = CommitLog(folder)
        with local_ray(settings, {}, progress.listen):
            # They import Ray, which only local_ray may import first.
            from chainfed_ray.cluster.offload.engine import server_evaluation
            from chainfed_ray.cluster.pool.ray_pool import RayPool

            notes = Notes(progress.listen)
            ray_pool = RayPool(job.base, settings.client_slots, notes.note)
            with closing(ray_pool) as pool, closing(server_evaluation(job, notes)) as evaluation:
                coordinator = Coordinator(job, pool, log, evaluation, notes)
                job_started, job_finished = _run_rounds(coordinator, log, progress)
        Reporter("saving the model", progress.listen).begin()
        coordinator.save(folder)
    rounds = log.rounds()
    return job_started, rounds, job_finished, JobResult.of(spec.name, job.classes, job_started, rounds, job_finished)


def _run_rounds(coordinator: Coordinator, log: CommitLog, progress: ProgressDisplay) -> tuple[JobStarted, JobFinished]:
    job_started = coordinator.open()
    progress.job_started(job_started)
    for record in log.rounds():
        progress.round(record, resumed=True)
    for record in coordinator.rounds():
        progress.round(record)
    job_finished = coordinator.finish()
    progress.job_finished(job_finished)
    return job_started, job_finished
