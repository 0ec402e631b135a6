"""Promises of the client for files: what is sent arrives, whatever breaks on the way, and nothing is sent twice."""

from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chainfed_ray.api.client import file_client
from chainfed_ray.api.client.file_client import FileClient
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.uploads.store import UploadStore
from chainfed_ray.errors import InvalidJob, ServiceUnavailable, UploadConflict, UploadNotFound
from chainfed_ray.spec.parse import parse_job
from tests.apps import an_app, served
from tests.builders import SPEC

ROWS = b"text,label\n" + b"a,sea\nb,sky\n" * 100


class Breaking:
    """Middleware that breaks the connection of the first requests, or answers them as a service that starts again."""

    def __init__(self, app: ASGIApp, broken: list[str]) -> None:
        self._app, self._broken = app, broken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""
        if scope["type"] == "http" and scope["path"].endswith("/content") and self._broken:
            if self._broken.pop() == "lost":  # it was done, and the answer does not come
                await self._app(scope, receive, _nobody)
            raise ConnectionError("the process ends")
        await self._app(scope, receive, send)


async def _nobody(message: object) -> None:
    pass


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_bytes(ROWS)
    return path


@pytest.fixture
def uploads(storage: Storage, store: JobStore) -> Iterator[UploadStore]:
    made = UploadStore(storage)
    yield made
    made.close()


@pytest.fixture
def app(store: JobStore, uploads: UploadStore) -> FastAPI:
    return an_app(store, uploads=uploads)


@pytest.mark.parametrize("broken", [[], ["early"], ["lost"], ["early", "lost", "early"]])
def test_a_file_arrives_although_connections_break(
    app: FastAPI, uploads: UploadStore, file: Path, broken: list[str]
) -> None:
    app.add_middleware(Breaking, broken=broken)
    told: list[str] = []
    with served(app) as address:
        client = FileClient(address)
        upload = client.add_upload(file, listen=lambda activity: told.append(activity.what))
        assert upload["complete"]
        assert client.add_upload(file) == upload
        assert client.uploads() == [upload]
        client.close()
    found = uploads.files("default", {"data": {"train": f"upload:{upload['id']}"}})
    assert found[upload["id"]].path.read_bytes() == ROWS
    assert told[:2] == ["reading rows.csv", "sending rows.csv: 0 %"]


def test_what_the_service_refuses_is_told(app: FastAPI, store: JobStore, file: Path) -> None:
    with served(app) as address:
        client = FileClient(address)
        with pytest.raises(InvalidJob, match=r"name is 'rows\.exe'"):
            client.add_upload(file, "rows.exe")
        upload = client.add_upload(file, "other.csv")["id"]
        document = SPEC.document()
        document["data"]["test"] = f"upload:{upload}"
        job = store.submit(parse_job(document)).id
        with pytest.raises(UploadConflict, match=job):
            client.delete_upload(upload)
        store.move(job, "cancelled")
        client.delete_upload(upload)
        with pytest.raises(UploadNotFound, match=upload):
            client.upload(upload)
        client.close()


@pytest.mark.parametrize("left", [0, 40, 1000])
def test_a_file_that_becomes_shorter_while_it_is_sent_is_refused(
    app: FastAPI, uploads: UploadStore, file: Path, left: int
) -> None:
    def shorten(activity: object) -> None:
        if activity != first[0]:  # not before its SHA-256 is known
            file.write_bytes(ROWS[:left])

    first: list[object] = []
    with served(app) as address:
        client = FileClient(address)
        with pytest.raises(InvalidJob, match=r"rows\.csv.*stays as it is"):
            client.add_upload(file, listen=lambda activity: shorten(activity) if first else first.append(activity))
        client.close()
    (found,) = uploads.page()
    assert (found.received, found.complete) == (left, False)


class Short:
    """Middleware that sends ``count`` bytes of an artifact and then breaks the connection; that takes minutes."""

    def __init__(self, app: ASGIApp, count: int, wait: Callable[[], None]) -> None:
        self._app, self._count, self._wait = app, count, wait

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""

        async def send_some(message: Message) -> None:
            body = message.get("body", b"")
            if self._count >= len(body):
                await send(message)
                return
            self._wait()
            if self._count:
                await send({**message, "body": body[: self._count], "more_body": True})
            raise ConnectionError("the connection breaks")

        await self._app(scope, receive, send_some if "/artifacts/" in scope.get("path", "") else send)


def test_a_download_gives_up_only_if_nothing_comes(
    store: JobStore, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, content, now = store.submit(SPEC).id, b"{}" * 500, [0.0]
    storage.job(job).mkdir(parents=True, exist_ok=True)
    (storage.job(job) / "partition.json").write_bytes(content)
    monkeypatch.setattr(file_client, "monotonic", lambda: now[0])
    monkeypatch.setattr(file_client, "sleep", lambda seconds: None)
    artifact = {"name": "partition.json", "sha256": sha256(content).hexdigest()}

    def wait() -> None:
        now[0] += 130

    for count, arrives in ((300, True), (0, False)):
        app, out = an_app(store, folder_of=storage.job), tmp_path / str(count)
        app.add_middleware(Short, count=count, wait=wait)
        with served(app) as address:
            client = FileClient(address)
            if arrives:
                client.download(job, artifact, out)
                assert out.read_bytes() == content
            else:
                with pytest.raises(ServiceUnavailable):
                    client.download(job, artifact, out)
            client.close()


def test_a_file_of_which_every_byte_came_and_was_not_checked_is_finished(
    app: FastAPI, uploads: UploadStore, file: Path
) -> None:
    """The process that took the last byte ended before it checked them."""
    with served(app) as address:
        client = FileClient(address)
        upload = uploads.begin("rows.csv", len(ROWS), sha256(ROWS).hexdigest())
        with uploads.receive(upload.id, 0) as arriving:
            arriving.append(ROWS)
        assert not client.upload(upload.id)["complete"]
        assert client.add_upload(file)["complete"]
        client.close()
