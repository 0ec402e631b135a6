"""Promises of backups: what is restored answers as at the time of the backup, wherever it is restored to."""

import json
import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import inspect, text

from chainfed_ray.api.operator.backup import back_up, restore
from chainfed_ray.api.operator.kept import Kept
from chainfed_ray.cluster.access.audit import Act, AuditLog
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.database import open_database
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.control import delete
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.objects.snapshots import Snapshots
from chainfed_ray.cluster.objects.working_copy import WorkingCopy
from chainfed_ray.cluster.schema import VERSIONS, dropping, migrate, version_of
from chainfed_ray.cluster.sites.mailbox import Mailbox
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import CorruptCommit, InvalidSetting
from chainfed_ray.model.saved_stack import load_stack, save_stack
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.wire.codec import survey_order
from chainfed_ray.wire.envelope import Done, JobDocument
from tests import postgres
from tests.builders import SPEC, a_round, a_start
from tests.models import a_saved_stack
from tests.pools import Killed

ACT = Act("alice", "0123", "POST /v1/jobs", "/v1/jobs/x", "10.1.2.3", "201", "r")
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


@pytest.mark.slow
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
    more = uploaded(uploads, b"more")
    more_bytes = uploads.files("default", {"data": {"train": f"upload:{more}"}})[more].path
    store.move(jobs[1], "running")
    storage.remove(jobs[0])
    delete(store, jobs[0])
    store.deletions.purge(jobs[0])
    store.close()
    uploads.close()
    if target == storage:
        with pytest.raises(InvalidSetting, match="--replace"):
            restore(target, tmp_path / "copy")
    restored, _ = restore(target, tmp_path / "copy", replace=target == storage)
    assert restored == made
    assert answers(target, jobs, upload) == then
    assert not target.committed(later).exists()
    if target == storage:
        assert not more_bytes.exists(), "nothing names it, so nobody would delete it"


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


@pytest.mark.slow
def test_an_upload_that_is_deleted_or_damaged_in_an_object_store(far: Storage, tmp_path: Path) -> None:
    JobStore(far.database).close()
    uploads, digest = UploadStore(far), sha256(ROWS).hexdigest()
    uploaded(uploads, ROWS)
    uploads.close()
    store, name = far.objects, f"uploads/default/{digest}"
    assert store
    store.delete([name])
    assert back_up(far, tmp_path / "copy").missing == (f"upload {digest} of default",)
    assert not any((tmp_path / "copy" / "uploads").glob("*/*")), "an empty file would be restored as a complete upload"
    store.put(name, ROWS[:-1])
    with pytest.raises(CorruptCommit, match="not those that were sent"):
        back_up(far, tmp_path / "another")
    assert not any((tmp_path / "another" / "uploads").glob("*/*"))


@pytest.mark.slow
@pytest.mark.parametrize("commits_on", [True, False])
def test_a_job_that_commits_to_an_object_store_while_it_is_copied(
    commits_on: bool, far: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(far.database)
    job = running(store, far, rounds=1)
    store.close()
    folder = far.root / "coordinator" / job
    assert far.objects
    coordinator, log, fetch = WorkingCopy(far.objects, job, folder), CommitLog(folder), Snapshots.fetch
    coordinator.begin()

    def late(snapshots: Snapshots, *file: Any) -> None:
        monkeypatch.setattr(Snapshots, "fetch", fetch)
        if commits_on:  # the snapshots that were listed are deleted by then
            for index in (1, 2, 3):
                log.commit_round(a_round(index, a_start()), {"x": torch.full((2,), float(index))})
                coordinator.commit()
        else:
            snapshots.objects.delete_below(f"{snapshots.prefix}/content")
        fetch(snapshots, *file)

    monkeypatch.setattr(Snapshots, "fetch", late)
    if not commits_on:
        with pytest.raises(CorruptCommit, match="missing"):
            back_up(far, tmp_path / "copy")
        return
    back_up(far, tmp_path / "copy")
    copied = CommitLog(tmp_path / "copy" / "jobs" / job)
    assert len(copied.rounds()) == 4
    assert copied.tensors(3)["x"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("has", "words"),
    [("key", "this has 1 keys"), ("upload", "this has 1 uploads"), ("act", "this has 1 entries of the audit log")],
)
def test_a_storage_that_has_anything_is_not_replaced_without_a_word(
    storage: Storage, tmp_path: Path, has: str, words: str
) -> None:
    back_up(storage, tmp_path / "copy")
    keys, uploads, audit = KeyStore(storage.database), UploadStore(storage), AuditLog(storage.database)
    if has == "key":
        keys.make_key("alice", ["read"])
    elif has == "upload":
        uploaded(uploads, ROWS)
    else:
        audit.note(ACT)
    for one in (keys, uploads, audit):
        one.close()
    before = (storage.root / "chainfed.db").read_bytes()
    with pytest.raises(InvalidSetting, match=rf"nothing in it; {words} \(see --replace\)"):
        restore(storage, tmp_path / "copy")
    assert (storage.root / "chainfed.db").read_bytes() == before


@pytest.mark.parametrize("is_cut_short", [False, True])
def test_what_was_revoked_stays_so_and_the_audit_log_forgets_nothing(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cut_short: bool
) -> None:
    storage = Storage.at(tmp_path / "storage", database)
    keys, audit = KeyStore(database), AuditLog(database)
    stays, ends = (keys.make_key("alice", ["read"]) for _ in range(2))
    audit.note(replace(ACT, target="before"))
    made = back_up(storage, tmp_path / "copy")
    keys.revoke(ends.key.id)
    later = keys.make_key("bob", ["read"])
    audit.note(replace(ACT, target="after"))
    for one in (keys, audit):
        one.close()
    if is_cut_short:
        with monkeypatch.context() as patch:
            patch.setattr(Kept, "put_back", killed)
            with pytest.raises(Killed):
                restore(storage, tmp_path / "copy", replace=True)
        keys = KeyStore(database)
        assert keys.authenticate(stays.token)
        assert not keys.authenticate(ends.token), "also before the restore is repeated"
        keys.close()
    again, returned = restore(storage, tmp_path / "copy", replace=True)
    assert again == made
    assert (returned.revoked, returned.lost) == ([ends.key.id], [later.key.id])
    assert returned.back == []
    keys, audit = KeyStore(database), AuditLog(database)
    assert [keys.authenticate(made.token) is not None for made in (stays, ends, later)] == [True, False, False]
    assert [entry.target for entry in audit.page()] == ["after", "before"]
    audit.note(replace(ACT, target="now"))
    assert audit.page(1)[0].target == "now"
    for one in (keys, audit):
        one.close()
    fresh = Storage.at(tmp_path / "fresh")
    if database.startswith("sqlite"):
        assert set(restore(fresh, tmp_path / "copy")[1].back) == {stays.key.id, ends.key.id}, (
            "nobody knows of them there"
        )


def test_a_restore_that_fails_leaves_the_database_as_it_was(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage.at(tmp_path / "storage", database)
    store = JobStore(database)
    back_up(storage, tmp_path / "copy")
    job = store.submit(SPEC).id
    store.close()
    monkeypatch.setattr(Kept, "revocations", lambda _: ["no statement;"])
    keys = KeyStore(database)
    made = keys.make_key("alice", ["read"])
    keys.close()
    with pytest.raises(InvalidSetting, match="no"):
        restore(storage, tmp_path / "copy", replace=True)
    store, keys = JobStore(database), KeyStore(database)
    assert store.get(job).status == "queued"
    assert keys.authenticate(made.token)
    store.close()
    keys.close()


def test_what_a_killed_restore_has_left_is_no_part_of_the_next_one(storage: Storage, tmp_path: Path) -> None:
    keys = KeyStore(storage.database)
    keys.make_key("alice", ["read"])
    back_up(storage, tmp_path / "first")
    bob = keys.make_key("bob", ["read"])
    back_up(storage, tmp_path / "second")
    keys.close()
    partial = storage.root / "chainfed.db.restored"
    shutil.copyfile(tmp_path / "first" / "database.db", partial)
    log = partial.with_name(f"{partial.name}-wal")
    with closing(sqlite3.connect(partial)) as connection:
        connection.execute("pragma journal_mode = wal")
        connection.execute("update keys set revoked_at = created_at")
        connection.commit()
        written = log.read_bytes()
    log.write_bytes(written)  # as it is if the process is killed here
    restore(storage, tmp_path / "second", replace=True)
    keys = KeyStore(storage.database)
    assert keys.authenticate(bob.token), "the log is of another copy"
    keys.close()
    assert not list(storage.root.glob("*.restored*"))


@pytest.mark.slow
@pytest.mark.parametrize("is_cut_short", [False, True])
def test_no_file_has_what_a_restore_puts_into_postgresql(
    empty_postgresql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cut_short: bool
) -> None:
    storage = Storage.at(tmp_path / "storage", empty_postgresql)
    store = JobStore(empty_postgresql)
    back_up(storage, tmp_path / "copy")
    job = store.submit(SPEC).id
    store.close()
    programs, seen = tmp_path / "programs", tmp_path / "seen"
    programs.mkdir()
    installed = postgres.installed()
    for name, line in (("psql", f'find {storage.root} -name "*.sql" >> {seen}; exec'), ("pg_restore", "")):
        ends = "; case $* in *--list*) ;; *) exit 1;; esac" if is_cut_short and name == "pg_restore" else ""
        (programs / name).write_text(f'#!/bin/sh\n{line} {installed}/{name} "$@"{ends}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    if is_cut_short:
        with pytest.raises(InvalidSetting, match="pg_restore"):
            restore(storage, tmp_path / "copy", replace=True)
    else:
        restore(storage, tmp_path / "copy", replace=True)
    assert seen.read_text() == ""
    store = JobStore(empty_postgresql)
    assert [found.id for found in store.page()] == ([job] if is_cut_short else []), "nobody has committed"
    store.close()


def killed(*_: object) -> None:
    raise Killed


def test_a_copy_is_its_owners_alone(storage: Storage, tmp_path: Path) -> None:
    JobStore(storage.database).close()
    folder = tmp_path / "copy"
    folder.mkdir()
    folder.chmod(0o755)
    back_up(storage, folder)
    restore(storage, folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    for database in (folder / "database.db", storage.root / "chainfed.db"):
        assert database.stat().st_mode & 0o777 == 0o600, "it has hashes of keys"


def test_orders_of_sites_are_given_again_after_a_restore(storage: Storage, tmp_path: Path) -> None:
    store = JobStore(storage.database)
    job = store.submit(SPEC).id
    store.close()
    mailbox, session, order = (
        Mailbox(storage),
        32 * "1",
        survey_order(job, "tiny", JobDocument(spec={}).described(), 64 * "0", "silo", "site:a.jsonl"),
    )
    mailbox.join("a", session, "1.0")
    mailbox.give("a", order)
    mailbox.next("a", session)
    mailbox.answer("a", order.id, session, Done(content={"loss": 0.5}))
    back_up(storage, tmp_path / "copy")
    mailbox.close()
    restore(storage, tmp_path / "copy", replace=True)
    mailbox = Mailbox(storage)
    assert mailbox.states({("a", order.id)}) == {}, "the tensors of its answer are not in the copy"
    mailbox.give("a", order)
    assert mailbox.waiting(["a"]) == {"a"}
    mailbox.close()


@pytest.mark.slow
def test_a_copy_of_the_version_before_is_restored_over_this_one(empty_postgresql: str, tmp_path: Path) -> None:
    storage, engine = Storage.at(tmp_path / "storage", empty_postgresql), open_database(empty_postgresql, existing=True)
    migrate(engine, VERSIONS[-1])
    store = JobStore(empty_postgresql)
    job = store.submit(SPEC).id
    store.close()
    with engine.begin() as connection:
        connection.execute(text("create table of_others (number integer)"))
    migrate(engine, "0002")
    back_up(storage, tmp_path / "copy")
    assert (tmp_path / "copy" / "database.dump").stat().st_mode & 0o777 == 0o600, "it has hashes of keys"
    migrate(engine, VERSIONS[-1])
    restore(storage, tmp_path / "copy", replace=True)
    store = JobStore(empty_postgresql)
    assert [found.id for found in store.page()] == [job]
    store.submit(SPEC)
    assert store.counts() == {"default": {"queued": 2}}
    store.close()
    assert version_of(engine) == VERSIONS[-1]

    with engine.begin() as connection:
        connection.execute(text("update chainfed_version set version_num = '9999'"))
    with pytest.raises(InvalidSetting, match="this one has 9999"):
        restore(storage, tmp_path / "copy", replace=True)
    with engine.begin() as connection:
        for statement in dropping():
            connection.execute(text(statement))
    assert inspect(engine).get_table_names() == ["of_others"]
    engine.dispose()
