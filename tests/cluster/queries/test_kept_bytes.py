"""Promise: the bytes that count for a tenant are those of its jobs that are over, in a folder or in an object store."""

import pytest

from chainfed_ray.cluster.jobs.cleanup import fail, note_bytes
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


def test_a_job_counts_with_all_its_files_from_its_end_to_its_deletion(storage: Storage, store: JobStore) -> None:
    job = store.submit(SPEC).id
    for name in ("rounds/0.json", "model/adapter_model.safetensors"):
        place = storage.job(job) / name
        place.parent.mkdir(parents=True)
        place.write_bytes(bytes(1000))
    (storage.job(job) / "link").symlink_to(storage.job(job) / "nothing")
    store.move(job, "running")
    note_bytes(job, store, storage)
    assert kept(store) == "", "it trains"
    fail(job, ValueError("no"), store, storage)
    assert "of jobs that are over" in kept(store)
    assert kept(store, "alice") == ""
    store.kept_bytes.check("default", 4000)
    store.move(job, "queued")
    assert kept(store) == "", "it is tried again"
    store.move(job, "running")
    fail(job, ValueError("no"), store, storage)
    assert kept(store)
    store.deletions.mark(job)
    assert kept(store) == ""


@pytest.mark.slow
def test_so_does_one_in_an_object_store(far: Storage) -> None:
    store = JobStore(far.database)
    job = store.submit(SPEC).id
    assert far.objects
    far.objects.put(f"jobs/{job}/snapshots/00000001", bytes(2000))
    store.move(job, "running")
    fail(job, ValueError("no"), store, far)
    assert kept(store) == "0B of uploads and 2KiB of jobs that are over"
    store.close()
