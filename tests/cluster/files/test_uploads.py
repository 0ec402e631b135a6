"""Promises of uploads: what arrived stays whoever is killed, the same bytes are kept once, and no tenant sees another's."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fcntl import LOCK_EX, LOCK_UN, flock
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chainfed_ray.cluster.files.arriving import ArrivingFile
from chainfed_ray.cluster.files.tenant_lock import MOST_AT_ONCE
from chainfed_ray.cluster.files.upload_bytes import UploadFolder
from chainfed_ray.cluster.files.uploads import Upload, UploadStore
from chainfed_ray.cluster.jobs.control import retry
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.tables import moment
from chainfed_ray.errors import InvalidJob, LimitReached, ServiceBusy, UploadConflict, UploadNotFound
from chainfed_ray.spec.parse import parse_job
from tests.builders import SPEC, fits
from tests.project import ROOT
from tests.watching import wait_for

ROWS = b"text,label\na,sea\nb,sky\n"


@pytest.fixture
def storage(tmp_path: Path, database: str) -> Storage:
    return Storage.at(tmp_path / "storage", database)


def begun(uploads: UploadStore, rows: bytes = ROWS, name: str = "rows.csv") -> Upload:
    return uploads.begin(name, len(rows), sha256(rows).hexdigest())


def send(uploads: UploadStore, upload: Upload, rows: bytes = ROWS, offset: int = 0) -> Upload:
    with uploads.receive(upload.id, offset) as file:
        file.append(rows)
        return uploads.finish(upload.id, file)


def added(uploads: UploadStore, rows: bytes = ROWS, name: str = "rows.csv") -> Upload:
    return send(uploads, begun(uploads, rows, name), rows)


def kept(storage: Storage, tenant: str = "default") -> list[bytes]:
    """The files of a tenant, whatever they are called."""
    return [path.read_bytes() for path in storage.uploads(tenant).iterdir() if path.name != "lock"]


@pytest.mark.slow
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(rows=st.binary(min_size=1, max_size=200), cuts=st.lists(st.integers(0, 200)))
def test_pieces_in_any_sizes_become_the_file(uploads: UploadStore, rows: bytes, cuts: list[int]) -> None:
    upload = begun(uploads, rows)
    places = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    for first, end in pairwise(places):
        if (now := uploads.get(upload.id)).complete:
            break
        assert (now.received, now.bytes) == (first, len(rows))
        with pytest.raises(UploadConflict, match=f"the next offset is {first}, not {first + 1}"):
            uploads.receive(upload.id, first + 1)
        send(uploads, upload, rows[first:end], first)
    done = uploads.get(upload.id)
    assert (done.complete, done.received) == (True, len(rows))
    document = {"data": {"train": f"upload:{upload.id}"}}
    assert uploads.files("default", document)[upload.id].path.read_bytes() == rows
    with pytest.raises(UploadConflict, match="it is complete"):
        uploads.receive(upload.id, len(rows))
    uploads.delete(upload.id)
    assert uploads.files("default", document) == {}


@pytest.mark.slow
def test_who_begins_it_again_goes_on_with_it(uploads: UploadStore, storage: Storage) -> None:
    upload = begun(uploads)
    send(uploads, upload, ROWS[:5])
    again = begun(uploads)
    assert (again.id, again.received, again.complete) == (upload.id, 5, False)
    send(uploads, again, ROWS[5:], 5)
    assert begun(uploads).complete
    with ThreadPoolExecutor(8) as threads:
        assert len({one.id for one in threads.map(lambda _: begun(uploads, b"other"), range(16))}) == 1


@pytest.mark.slow
def test_the_same_bytes_are_kept_once_until_the_last_upload_of_them_is_deleted(
    uploads: UploadStore, storage: Storage
) -> None:
    first, half = added(uploads), begun(uploads, name="half.csv")
    second = begun(uploads, name="other.csv")
    assert half.complete, "its bytes are here"
    assert (second.complete, second.id != first.id) == (True, True)
    assert kept(storage) == [ROWS]
    for upload in (first, half):
        uploads.delete(upload.id)
        assert kept(storage) == [ROWS]
    uploads.delete(second.id)
    assert kept(storage) == []


@pytest.mark.slow
def test_twins_that_send_the_same_bytes_under_two_names_leave_one_file(uploads: UploadStore, storage: Storage) -> None:
    twins = [begun(uploads, name=name) for name in ("a.csv", "b.csv")]
    with uploads.receive(twins[0].id, 0) as one, uploads.receive(twins[1].id, 0) as other:
        one.append(ROWS)
        other.append(ROWS)
        assert uploads.finish(twins[0].id, one).complete
        assert uploads.finish(twins[1].id, other).complete
    uploads.remove_old()
    assert kept(storage) == [ROWS]


@pytest.mark.slow
def test_bytes_with_another_digest_are_forgotten(uploads: UploadStore, storage: Storage) -> None:
    upload = begun(uploads)
    with pytest.raises(InvalidJob, match="sha256 is"):
        send(uploads, upload, ROWS[::-1])
    assert uploads.get(upload.id).received == 0
    with pytest.raises(UploadConflict, match="and more were sent"), uploads.receive(upload.id, 0) as file:
        file.append(ROWS + b"x")
    assert send(uploads, upload).complete


def test_one_writer_at_a_time(uploads: UploadStore) -> None:
    upload = begun(uploads)
    with uploads.receive(upload.id, 0), pytest.raises(UploadConflict, match="another request sends to it now"):
        uploads.receive(upload.id, 0)
    assert send(uploads, upload).complete


WRITER = """
import sys
from pathlib import Path
from chainfed_ray.cluster.files.arriving import ArrivingFile
with ArrivingFile("u", Path(sys.argv[1]), 10**9) as file:
    for number in range(10**9):
        file.append(number.to_bytes(8, "big") * 100)
"""


@pytest.mark.slow
def test_an_upload_goes_on_where_a_killed_process_left_it(tmp_path: Path) -> None:
    path = tmp_path / "u.partial"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for enough in (100_000, 300_000):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], env=environment)
        wait_for(lambda enough=enough: path.exists() and path.stat().st_size > enough, "bytes")
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        with ArrivingFile("u", path, 10**9) as file:
            assert file.received == path.stat().st_size > enough
        left = path.read_bytes()
    whole = left + b"the rest"
    with ArrivingFile("u", path, len(whole)) as file:
        file.append(b"the rest")
        assert file.digest() == sha256(whole).hexdigest()


@pytest.mark.slow
def test_what_was_checked_before_a_kill_is_complete(uploads: UploadStore, store: JobStore, storage: Storage) -> None:
    """The process is killed after the bytes have their place, and before the database says so."""
    upload, document = begun(uploads), SPEC.document()
    (storage.uploads("default") / upload.sha256).write_bytes(ROWS)
    document["data"]["test"] = f"upload:{upload.id}"
    assert uploads.files("default", document), "the check of a job asks for these"
    assert store.submit(parse_job(document)).status == "queued"
    assert uploads.get(upload.id).complete


@pytest.mark.slow
def test_a_kill_before_the_check_costs_the_check_alone(uploads: UploadStore, storage: Storage) -> None:
    upload = begun(uploads)
    (storage.uploads("default") / f"{upload.id}.partial").write_bytes(ROWS)
    assert not uploads.get(upload.id).complete
    assert send(uploads, upload, b"", len(ROWS)).complete


@pytest.mark.slow
def test_a_tenant_sees_its_own_alone(uploads: UploadStore, storage: Storage) -> None:
    alice, bob = (uploads.seen_by(tenant, everything=False) for tenant in ("alice", "bob"))
    upload = added(alice)
    for ask in (bob.get, bob.delete, lambda one: bob.receive(one, 0)):
        with pytest.raises(UploadNotFound):
            ask(upload.id)
    with pytest.raises(UploadNotFound):
        uploads.get("a\0b")
    after = upload.created_at, upload.id
    assert (bob.page(), bob.page(after=after), [one.id for one in alice.page()]) == ([], [], [upload.id])
    assert not begun(bob).complete, "who has no bytes gets none by their digest"
    document = {"data": {"train": f"upload:{upload.id}"}, "evaluation": {"choices": "upload:none"}}
    assert set(uploads.files("alice", document)) == {upload.id}
    assert uploads.files("bob", document) == {}
    assert [one.tenant for one in uploads.seen_by("ops", everything=True).page()] == ["bob", "alice"]


@pytest.mark.slow
def test_a_tenant_has_as_many_bytes_as_it_may(uploads: UploadStore) -> None:
    def begin(who: str, name: str, rows: bytes) -> Upload:
        own = uploads.seen_by(who, everything=False)
        return own.begin(name, len(rows), sha256(rows).hexdigest(), most_stored=100)

    first = begin("alice", "a.csv", b"a" * 60)
    with pytest.raises(LimitReached, match="CHAINFED_STORED_BYTES"):
        begin("alice", "b.csv", b"b" * 60)
    assert begin("alice", "a.csv", b"a" * 60) == first
    begin("alice", "again.csv", b"a" * 60)
    begin("bob", "b.csv", b"b" * 60)
    begin("alice", "c.csv", b"c" * 40)
    with pytest.raises(InvalidJob, match="bytes is 7"):
        uploads.seen_by("alice", everything=False).begin("d.csv", 7, first.sha256)


def test_requests_of_one_tenant_do_not_wait_in_all_threads(storage: Storage, store: JobStore) -> None:
    uploads, waits = UploadStore(storage, lock_seconds=0.1), UploadStore(storage, lock_seconds=60)
    storage.uploads("a").mkdir(parents=True)
    with (storage.uploads("a") / "lock").open("ab") as elsewhere, ThreadPoolExecutor(45) as threads:
        flock(elsewhere, LOCK_EX)
        with pytest.raises(ServiceBusy, match="one tenant's uploads"):
            begun(uploads.seen_by("a", everything=False))
        begun(uploads.seen_by("b", everything=False))
        asked = [threads.submit(begun, waits.seen_by("a", everything=False)) for _ in range(45)]
        wait_for(lambda: sum(one.done() for one in asked) == 45 - MOST_AT_ONCE, "refusals")
        assert all(isinstance(one.exception(), ServiceBusy) for one in asked if one.done())
        flock(elsewhere, LOCK_UN)
        busy = sum(isinstance(one.exception(), ServiceBusy) for one in asked)
    assert busy == 45 - MOST_AT_ONCE, "who waited has its turn"
    uploads.close()
    waits.close()


def test_others_begin_uploads_while_bytes_are_kept(uploads: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, upload = UploadFolder.keep, begun(uploads)

    def slow(self: UploadFolder, *of: str) -> None:
        assert begun(uploads, b"others").received == 0
        keep(self, *of)

    def deleted(self: UploadFolder, *of: str) -> None:
        keep(self, *of)
        uploads.delete(upload.id)

    monkeypatch.setattr(UploadFolder, "keep", slow)
    assert send(uploads, upload).complete
    uploads.delete(upload.id)
    upload = begun(uploads)
    monkeypatch.setattr(UploadFolder, "keep", deleted)
    with pytest.raises(UploadNotFound):
        send(uploads, upload)


@pytest.mark.slow
def test_a_tenant_has_as_many_uploads_as_it_may(uploads: UploadStore) -> None:
    def begin(who: str, name: str) -> Upload:
        own = uploads.seen_by(who, everything=False)
        return own.begin(name, len(ROWS), sha256(ROWS).hexdigest(), most_uploads=2)

    first = begin("alice", "a.csv")
    begin("alice", "b.csv")
    with pytest.raises(LimitReached, match="2 uploads, as many as CHAINFED_UPLOADS"):
        begin("alice", "c.csv")
    assert begin("alice", "a.csv") == first
    begin("bob", "c.csv")
    uploads.delete(first.id)
    begin("alice", "c.csv")


@pytest.mark.slow
@pytest.mark.parametrize("key", ["train", "validation", "test"])
def test_an_upload_that_a_job_reads_is_not_deleted(uploads: UploadStore, store: JobStore, key: str) -> None:
    upload, other = added(uploads), added(uploads, b"other")
    document = SPEC.document()
    document["data"][key] = f"upload:{upload.id}"
    with pytest.raises(InvalidJob, match=rf"data\.{key} is"):
        store.seen_by("bob", everything=False).submit(parse_job(document))
    job = store.submit(parse_job(document)).id
    for state in ("queued", "running"):
        with pytest.raises(UploadConflict, match=f"job {job} reads it"):
            uploads.delete(upload.id)
        assert state == store.get(job).status
        store.move(job, "running")
    uploads.delete(other.id)
    store.move(job, "failed", error={})
    uploads.delete(upload.id)
    with pytest.raises(InvalidJob, match=rf"data\.{key} is"):
        store.submit(parse_job(document))
    with pytest.raises(InvalidJob, match=rf"data\.{key} is"):
        retry(store, job, fits)
    assert store.get(job).status == "failed", "with the error that it had"


@pytest.mark.slow
def test_a_job_is_queued_or_its_upload_is_deleted_and_never_both(uploads: UploadStore, store: JobStore) -> None:
    outcomes = set()
    for number in range(20):
        upload, document = added(uploads, f"rows {number}".encode()), SPEC.document()
        document["data"]["train"] = f"upload:{upload.id}"
        start = Barrier(2)

        def submit(document: Any = document, start: Barrier = start) -> bool:
            start.wait(60)
            try:
                return bool(store.submit(parse_job(document)))
            except InvalidJob:
                return False

        def remove(upload: Upload = upload, start: Barrier = start) -> bool:
            start.wait(60)
            try:
                uploads.delete(upload.id)
            except UploadConflict:
                return False
            return True

        with ThreadPoolExecutor(2) as threads:
            queued, deleted = (threads.submit(act) for act in (submit, remove))
            outcomes.add((queued.result(), deleted.result()))
    assert outcomes <= {(True, False), (False, True)}


@pytest.mark.slow
def test_old_parts_and_forgotten_bytes_are_removed(uploads: UploadStore, storage: Storage) -> None:
    done, half, empty = added(uploads), begun(uploads, b"half"), begun(uploads, b"empty")
    send(uploads, half, b"ha")
    (storage.uploads("default") / (64 * "0")).write_bytes(b"of an upload that was deleted by a process that was killed")
    assert uploads.remove_old() == 0
    assert {one.id for one in uploads.page()} == {done.id, half.id, empty.id}
    assert sorted(kept(storage)) == sorted([ROWS, b"ha"])
    with uploads.receive(empty.id, 0):
        assert uploads.remove_old(hours=0) == 1, "one is on its way"
    assert {one.id for one in uploads.page()} == {done.id, empty.id}
    assert uploads.remove_old(hours=0) == 1
    assert kept(storage) == [ROWS]


@pytest.mark.slow
def test_pages_are_of_the_newest_first_and_go_on_after_one_that_was_deleted(uploads: UploadStore) -> None:
    made: list[Upload] = []
    for number in range(5):
        made.append(begun(uploads, name=f"{number}.csv"))
        wait_for(lambda: moment() > made[-1].created_at, "later time")
    ids = [one.id for one in made]
    assert [one.id for one in uploads.page(limit=2)] == ids[:2:-1]
    assert [one.id for one in uploads.page(after=(made[3].created_at, made[3].id))] == ids[2::-1]
    uploads.delete(ids[3])
    assert [one.id for one in uploads.page(limit=2, after=(made[3].created_at, made[3].id))] == ids[2:0:-1]
