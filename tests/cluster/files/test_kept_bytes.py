"""Promise: the bytes that count for a tenant are those of its jobs as they were paused or over, whatever they do since."""

from errno import ENOTCONN

import pytest
from sqlalchemy import Engine, event

from chainfed_ray.cluster.jobs.cleanup import fail, pause
from chainfed_ray.cluster.jobs.control import delete
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import LimitReached
from tests.builders import SPEC


def kept(store: JobStore, tenant: str = "default") -> str:
    """What a tenant has, in words; nothing if that is less than a byte."""
    try:
        store.kept_bytes.check(tenant, 1)
    except LimitReached as error:
        return error.what
    return ""


def test_a_job_counts_with_all_its_files_from_when_it_was_paused_or_over_to_its_deletion(
    storage: Storage, store: JobStore
) -> None:
    job = store.submit(SPEC).id
    for name in ("rounds/0.json", "model/adapter_model.safetensors"):
        place = storage.job(job) / name
        place.parent.mkdir(parents=True)
        place.write_bytes(bytes(1000))
    (storage.job(job) / "link").symlink_to("nothing")
    store.move(job, "running")
    assert kept(store) == "", "nothing is known of it"
    store.move(job, "pausing")
    pause(job, store, storage)
    assert (store.get(job).status, kept(store)) == ("paused", "0B of uploads and 2KiB of jobs")
    assert kept(store, "alice") == ""
    (storage.job(job) / "model" / "more").write_bytes(bytes(10_000))
    store.move(job, "queued")
    store.move(job, "running")
    assert kept(store) == "0B of uploads and 2KiB of jobs", "it goes on"
    fail(job, ValueError("no"), store, storage)
    assert kept(store) == "0B of uploads and 11.7KiB of jobs"
    store.kept_bytes.check("default", 14_000)
    store.move(job, "queued")
    assert kept(store) == "0B of uploads and 11.7KiB of jobs", "it is tried again"
    store.move(job, "cancelled")
    other = store.submit(SPEC).id
    store.kept_bytes.note(other, 5000)
    assert kept(store) == "0B of uploads and 16.6KiB of jobs"
    delete(store, job)
    assert kept(store) == "0B of uploads and 4.9KiB of jobs"
    store.deletions.purge(job)
    assert kept(store) == "0B of uploads and 4.9KiB of jobs"


def test_a_pause_does_not_wait_for_an_object_store_that_is_away(
    storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = store.submit(SPEC).id
    store.move(job, "running")
    store.move(job, "pausing")

    def away(*_: object) -> None:
        raise OSError(ENOTCONN, "away")

    monkeypatch.setattr(store.kept_bytes, "note", away)
    pause(job, store, storage)
    assert store.get(job).status == "paused"


def test_what_is_kept_is_not_added_up_job_by_job(store: JobStore) -> None:
    asked = list[str]()

    def note(_: object, __: object, statement: str, *___: object) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        assert kept(store) == ""
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert asked
    assert not [statement for statement in asked if "from jobs" in " ".join(statement.lower().split())]


@pytest.mark.slow
def test_so_does_one_in_an_object_store(far: Storage) -> None:
    store = JobStore(far.database)
    job = store.submit(SPEC).id
    assert far.objects
    far.objects.put(f"jobs/{job}/snapshots/00000001", bytes(2000))
    store.move(job, "running")
    fail(job, ValueError("no"), store, far)
    assert kept(store) == "0B of uploads and 2KiB of jobs"
    store.close()
