"""Promises of backups: what is restored answers as at the time of the backup, wherever it is restored to."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from chainfed_ray.api.operator.backup import back_up, restore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.objects.working_copy import WorkingCopy
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.uploads.store import UploadStore
from chainfed_ray.errors import CorruptCommit, InvalidSetting
from chainfed_ray.model.saved_stack import load_stack, save_stack
from chainfed_ray.records.commit_log import CommitLog
from tests.builders import SPEC, a_round, a_start
from tests.models import a_saved_stack

ROWS = b"text,label\na,sea\n"


def commit(storage: Storage, job: str) -> None:
    """As a coordinator does once its job's folder has something new."""
    if storage.objects:
        copy = WorkingCopy(storage.objects, job, storage.root / "coordinator" / job)
        copy.begin()
        shutil.rmtree(storage.root / "coordinator" / job, ignore_errors=True)
        shutil.copytree(storage.job(job), storage.root / "coordinator" / job)
        copy.commit()


def finished(store: JobStore, storage: Storage, model: Path, seed: int) -> str:
    """A job that has succeeded, with its model."""
    job = store.submit(SPEC).id
    store.move(job, "validating")
    store.move(job, "running")
    save_stack(a_saved_stack(model, seed=seed), storage.job(job) / "model")
    commit(storage, job)
    store.move(job, "succeeded", result={"seed": seed})
    return job


def running(store: JobStore, storage: Storage, rounds: int) -> str:
    """A job with noise that has committed some rounds."""
    job = store.submit(SPEC).id
    store.move(job, "validating")
    log, start = CommitLog(storage.job(job)), a_start()
    log.commit_started(start)
    log.secret()
    for index in range(rounds):
        log.commit_round(a_round(index, start), {"x": torch.full((2,), float(index))})
    commit(storage, job)
    return job


def uploaded(uploads: UploadStore, rows: bytes) -> str:
    upload = uploads.begin("rows.csv", len(rows), sha256(rows).hexdigest())
    with uploads.receive(upload.id, 0) as file:
        file.append(rows)
        return uploads.finish(upload.id, file).id


def answers(storage: Storage, jobs: list[str], upload: str) -> list[Any]:
    """What a service with this storage answers of two jobs and an upload, and how many jobs and uploads it has."""
    store, uploads = JobStore(storage.database, existing=True), UploadStore(storage)
    done, goes_on = jobs
    if storage.objects:
        folder = storage.root / "looked at" / "job"
        WorkingCopy(storage.objects, goes_on, folder).begin()
    else:
        folder = storage.job(goes_on)
    log = CommitLog(folder)
    found = [
        [(job.id, job.status, job.result) for job in store.page()],
        [(event.seq, event.kind, event.at) for event in store.events(done)],
        {name: tensor.tolist() for name, tensor in load_stack(storage.model(done)).tensors().items()},
        [record.model_dump() for record in log.rounds()],
        log.tensors(len(log.rounds()) - 1)["x"].tolist(),
        log.secret(),
        uploads.files("default", {"data": {"train": f"upload:{upload}"}})[upload].path.read_bytes(),
        len(uploads.page()),
    ]
    store.close()
    uploads.close()
    return found


def near(tmp_path: Path, request: pytest.FixtureRequest) -> Storage:
    return Storage.at(tmp_path / "near")


def far(tmp_path: Path, request: pytest.FixtureRequest) -> Storage:
    url = request.getfixturevalue("s3").url(f"backup/{tmp_path.name}")
    return Storage.at(tmp_path / "far", url=url)


@pytest.mark.parametrize(("before", "after"), [(near, near), (near, far), (far, near), ("postgresql", "postgresql")])
def test_what_is_restored_answers_as_at_the_time_of_the_backup(
    before: Any, after: Any, tiny_model_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if before == "postgresql":
        url = request.getfixturevalue("empty_postgresql")
        storage = target = Storage.at(tmp_path / "near", url)
    else:
        storage, target = before(tmp_path, request), after(tmp_path, request)
    store = JobStore(storage.database)
    uploads = UploadStore(storage)
    jobs = [finished(store, storage, tiny_model_folder, seed=1), running(store, storage, rounds=3)]
    upload = uploaded(uploads, ROWS)
    then = answers(storage, jobs, upload)
    made = back_up(storage, tmp_path / "copy")  # while connections are open, as of a service that runs
    assert (made.jobs, made.uploads, made.missing) == (2, 1, ())
    with pytest.raises(InvalidSetting, match="new, or empty"):
        back_up(storage, tmp_path / "copy")

    later = finished(store, storage, tiny_model_folder, seed=2)
    uploaded(uploads, b"more")
    store.move(jobs[1], "running")
    storage.remove(jobs[0])
    store.deletions.mark(jobs[0])
    store.deletions.purge(jobs[0])
    store.close()
    uploads.close()
    if target == storage:
        with pytest.raises(InvalidSetting, match="--replace"):
            restore(target, tmp_path / "copy")
    restored = restore(target, tmp_path / "copy", replace=target == storage)
    assert restored == made
    assert answers(target, jobs, upload) == then
    assert not target.committed(later).exists()


def test_a_copy_that_is_damaged_is_refused_before_anything_is_changed(
    storage: Storage, tiny_model_folder: Path, tmp_path: Path
) -> None:
    store = JobStore(storage.database)
    job = finished(store, storage, tiny_model_folder, seed=1)
    store.close()
    back_up(storage, tmp_path / "copy")
    weights = tmp_path / "copy" / "jobs" / job / "model" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CorruptCommit, match=r"adapter_model\.safetensors"):
        restore(storage, tmp_path / "copy", replace=True)
    weights.unlink()
    with pytest.raises(CorruptCommit, match="missing"):
        restore(storage, tmp_path / "copy", replace=True)
    assert load_stack(storage.model(job)), "it is as it was"
    with pytest.raises(InvalidSetting, match=r"with its backup\.json"):
        restore(storage, tmp_path / "another")


def test_a_job_that_commits_while_it_is_copied(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(storage.database)
    job = running(store, storage, rounds=2)
    store.close()
    log, copy2 = CommitLog(storage.job(job)), shutil.copy2

    def commits(source: Path, place: Path) -> object:
        index = len(log.rounds())
        if index < 6:
            log.commit_round(a_round(index, a_start()), {"x": torch.full((2,), float(index))})
        return copy2(source, place)

    monkeypatch.setattr(shutil, "copy2", commits)
    back_up(storage, tmp_path / "copy")
    copied = CommitLog(tmp_path / "copy" / "jobs" / job)
    newest = len(copied.rounds()) - 1
    assert copied.tensors(newest)["x"].tolist() == [float(newest)] * 2


def test_what_is_deleted_while_it_is_copied_is_told(storage: Storage, tiny_model_folder: Path, tmp_path: Path) -> None:
    store = JobStore(storage.database)
    job = finished(store, storage, tiny_model_folder, seed=1)
    store.close()
    storage.remove(job)
    assert back_up(storage, tmp_path / "copy").missing == (f"job {job}",)
    assert json.loads((tmp_path / "copy" / "backup.json").read_text())["missing"] == [f"job {job}"]
