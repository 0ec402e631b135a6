"""Promises of uploads in S3: pieces may come to any machine, bytes are kept once, and a job reads what was sent."""

import os
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from threading import Event

import pytest
from fastapi.testclient import TestClient

from chainfed_ray.cluster.files.upload_bytes import ArrivingPieces, StoredUploads
from chainfed_ray.cluster.files.upload_expiry import remove_old_uploads
from chainfed_ray.cluster.files.uploads import Upload, UploadStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import InvalidJob, UploadConflict
from tests.apps import an_app
from tests.s3 import Server

ROWS = b"text,label\na,sea\nb,sky\n" * 100_000  # more than two requests of a part each
DIGEST = sha256(ROWS).hexdigest()


def send(uploads: UploadStore, upload: Upload, rows: bytes, offset: int = 0) -> Upload:
    with uploads.receive(upload.id, offset) as file:
        file.append(rows)
        return uploads.finish(upload.id, file)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before it is checked", "after it is checked"])
def test_an_upload_that_two_requests_finish_at_once_has_its_bytes(
    moment: str, far: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    JobStore(far.database).close()
    uploads, check = UploadStore(far), ArrivingPieces.digest
    begun = uploads.begin("rows.csv", len(ROWS), DIGEST)
    held, again = (uploads.receive(begun.id, 0) for _ in range(2))  # the same request, sent twice
    for file in (held, again):
        file.append(ROWS)
        file.flush()

    def other_is_faster(self: ArrivingPieces) -> str:
        checked = check(self) if moment == "after it is checked" else ""
        with monkeypatch.context() as patch:
            patch.setattr(ArrivingPieces, "digest", check)
            assert uploads.finish(begun.id, again).complete
        return checked or check(self)

    monkeypatch.setattr(ArrivingPieces, "digest", other_is_faster)
    assert uploads.finish(begun.id, held).complete
    assert far.objects is not None
    assert far.objects.get(f"uploads/default/{DIGEST}") == ROWS
    document = {"data": {"train": f"upload:{begun.id}"}}
    assert uploads.files("default", document)[begun.id].path.read_bytes() == ROWS
    uploads.close()


def test_each_hour_files_that_no_job_reads_are_deleted(far: Storage) -> None:
    JobStore(far.database).close()
    used, unused, stop = far.uploads("default") / "used", far.uploads("default") / "unused", Event()
    used.parent.mkdir(parents=True)
    used.touch()
    unused.touch()
    os.utime(unused, (0, 0))
    stop.set()
    remove_old_uploads(far, stop, StoredUploads(ObjectStore(str(far.url)), far).drop_unused)
    assert [used.exists(), unused.exists()] == [True, False]


def test_only_bytes_that_were_checked_are_kept(far: Storage) -> None:
    files = StoredUploads(ObjectStore(str(far.url)), far)
    with files.arriving("default", "upload", len(ROWS)) as file:
        file.append(ROWS[1:])
        file.flush()
        with pytest.raises(UploadConflict, match="another request"):
            files.keep("default", "upload", DIGEST)
    assert not files.has("default", DIGEST)


@pytest.mark.slow
def test_an_upload_through_two_machines(far: Storage, tmp_path: Path, s3: Server) -> None:
    store = JobStore(far.database)
    first, second = (UploadStore(Storage.at(tmp_path / name, far.database, url=far.url)) for name in "ab")
    begun = first.begin("rows.csv", len(ROWS), DIGEST)
    assert send(first, begun, ROWS[:1000]).received == 1000
    with pytest.raises(UploadConflict, match="the next offset is 1000"):
        second.receive(begun.id, 0)
    held, late = second.receive(begun.id, 1000), first.receive(begun.id, 1000)
    held.append(ROWS[1000:2000])
    held.close()
    late.append(b"another thousand")
    with pytest.raises(UploadConflict, match="another request"):
        late.close()
    with pytest.raises(InvalidJob, match="sha256"):
        send(second, begun, b"x" * (len(ROWS) - 2000), 2000)
    assert first.get(begun.id).received == 0, "bytes with another digest are forgotten"
    assert send(second, begun, ROWS).complete

    document = {"data": {"train": f"upload:{begun.id}"}}
    unused = tmp_path / "a" / "uploads" / "default" / "unused"
    unused.touch()
    os.utime(unused, (0, 0))
    assert first.files("default", document)[begun.id].path.read_bytes() == ROWS
    assert not unused.exists(), "a machine keeps what its jobs read for a day"
    assert first.begin("twin.csv", len(ROWS), DIGEST).complete, "its bytes are here"
    half = first.begin("half.csv", 100, 64 * "0")
    send(first, half, b"part")
    assert far.objects is not None
    far.objects.put(f"uploads/default/{64 * '1'}", b"of an upload that nobody has")
    assert second.remove_old(hours=1) == 0
    assert far.objects.files("uploads/default") == [DIGEST], "what no upload has is deleted"
    assert second.remove_old(hours=-timedelta(hours=1).total_seconds()) == 1
    assert far.objects.folders("uploads/default") == []

    s3.door.shut = True
    try:
        with TestClient(an_app(store, uploads=first), "http://localhost", raise_server_exceptions=False) as client:
            answer = client.post(
                "/v1/uploads", json={"name": "more.csv", "bytes": 4, "sha256": sha256(b"more").hexdigest()}
            )
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5"), answer.text
            assert "the storage does not answer" in answer.json()["detail"]
    finally:
        s3.door.shut = False
    for upload in first.page():
        first.delete(upload.id)
    assert far.objects.below("uploads") == []
    for open_ in (first, second, store):
        open_.close()
