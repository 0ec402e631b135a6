"""Promises of the routes of uploads: bytes are taken as they come, within bounds, and a job reads its tenant's alone."""

import asyncio
from hashlib import sha256
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from chainfed_ray.api.serve.front_door import MOST_BYTES as MOST_OF_A_BODY
from chainfed_ray.cluster.files.arriving import ArrivingFile
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.spec.parse import parse_job
from tests.apps import MOST_BYTES, an_app
from tests.builders import SPEC

ROWS = b"text,label\na,sea\nb,sky\n"


@pytest.fixture
def app(store: JobStore, uploads: UploadStore) -> FastAPI:
    return an_app(store, uploads=uploads)


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app, "http://localhost", raise_server_exceptions=False)


def describe(rows: bytes, name: str = "rows.csv") -> dict[str, Any]:
    return {"name": name, "bytes": len(rows), "sha256": sha256(rows).hexdigest()}


def begun(client: TestClient, rows: bytes = ROWS, name: str = "rows.csv") -> str:
    answer = client.post("/v1/uploads", json=describe(rows, name))
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/uploads/{answer.json()['id']}"
    return str(answer.json()["id"])


def put(client: TestClient, upload: str, rows: bytes, offset: int = 0) -> httpx.Response:
    return client.put(f"/v1/uploads/{upload}/content", params={"offset": offset}, content=rows)


@pytest.mark.slow
def test_an_upload_from_its_beginning_to_its_end(client: TestClient) -> None:
    upload = begun(client)
    half = put(client, upload, ROWS[:9]).json()
    assert (half["received"], half["complete"]) == (9, False)
    wrong = put(client, upload, ROWS)
    assert (wrong.status_code, wrong.json()["type"]) == (409, "urn:chainfed:problem:upload-conflict")
    assert "the next offset is 9" in wrong.json()["detail"]
    assert client.get(f"/v1/uploads/{upload}").json() == half

    whole = put(client, upload, ROWS[9:], 9).json()
    assert whole == {**half, "received": len(ROWS), "complete": True}
    begun(client, b"others", "others.jsonl.gz")
    page = client.get("/v1/uploads", params={"limit": 1}).json()
    assert [one["name"] for one in page["uploads"]] == ["others.jsonl.gz"]
    rest = client.get("/v1/uploads", params={"cursor": page["next"]}).json()
    assert (rest["uploads"], rest["next"]) == ([whole], None)
    refused = client.get("/v1/uploads", params={"cursor": upload})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "cursor")

    gone = client.delete(f"/v1/uploads/{upload}")
    assert (gone.status_code, gone.content, gone.headers.get("content-type")) == (204, b"", None)
    gone = client.get(f"/v1/uploads/{upload}")
    assert (gone.status_code, gone.json()["type"]) == (404, "urn:chainfed:problem:upload-not-found")
    assert client.delete(f"/v1/uploads/{upload}").status_code == 404


def test_what_an_upload_may_be(client: TestClient) -> None:
    assert client.post("/v1/uploads", json=describe(b"x" * (MOST_BYTES + 1))).status_code == 413
    for wrong in ({"name": "rows.exe"}, {"name": "../rows.csv"}, {"bytes": 0}, {"sha256": "x"}, {"more": 1}):
        answer = client.post("/v1/uploads", json={**describe(ROWS), **wrong})
        assert (answer.status_code, [one["field"] for one in answer.json()["errors"]]) == (422, [*wrong]), wrong
    upload = begun(client)
    assert put(client, upload, ROWS + b"x").status_code == 409
    assert put(client, upload, ROWS[::-1]).json()["errors"][0]["field"] == "sha256"
    assert client.get(f"/v1/uploads/{upload}").json()["received"] == 0
    assert client.put(f"/v1/uploads/{upload}/content", params={"offset": "x"}, content=ROWS).status_code == 422


def test_bodies_of_uploads_may_be_larger_than_others(store: JobStore, uploads: UploadStore) -> None:
    rows = b"x" * (MOST_OF_A_BODY + 1)
    upload = uploads.begin("rows.csv", len(rows), sha256(rows).hexdigest())
    client = TestClient(an_app(store, uploads=uploads), "http://localhost")
    assert put(client, upload.id, rows).json()["complete"]
    assert client.post("/v1/uploads", content=rows, headers={"Content-Type": "application/json"}).status_code == 413


def test_what_came_before_the_caller_left_stays(app: FastAPI, uploads: UploadStore) -> None:
    upload = uploads.begin("rows.csv", len(ROWS), sha256(ROWS).hexdigest())
    messages = [{"type": "http.request", "body": ROWS[:7], "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        assert message.get("status", 499) == 499

    path = f"/v1/uploads/{upload.id}/content"
    scope = {
        "type": "http", "method": "PUT", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
        "http_version": "1.1", "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert uploads.get(upload.id).received == 7
    with uploads.receive(upload.id, 7) as file:
        file.append(ROWS[7:])
        assert uploads.finish(upload.id, file).complete


def test_a_full_disk_is_told_and_what_came_before_stays(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = begun(client)

    def full(self: ArrivingFile, piece: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ArrivingFile, "append", full)
        answer = put(client, upload, ROWS)
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:chainfed:problem:part-unavailable")
    assert "No space left on device" in answer.json()["detail"]
    assert put(client, upload, ROWS).json()["complete"]


def test_a_job_keeps_what_it_reads(client: TestClient, store: JobStore) -> None:
    upload = begun(client)
    assert put(client, upload, ROWS).json()["complete"]
    document = SPEC.document()
    document["data"]["train"] = f"upload:{upload}"
    job = store.submit(parse_job(document)).id
    answer = client.delete(f"/v1/uploads/{upload}")
    assert (answer.status_code, job in answer.json()["detail"]) == (409, True)
    assert client.post(f"/v1/jobs/{job}/cancel").status_code == 202
    assert client.delete(f"/v1/uploads/{upload}").status_code == 204
