"""Promises of the client for files: what is sent arrives, whatever breaks on the way, and nothing is sent twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from chainfed_ray.api.client.file_client import FileClient
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.uploads.store import UploadStore
from chainfed_ray.errors import InvalidJob, UploadConflict, UploadNotFound
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
