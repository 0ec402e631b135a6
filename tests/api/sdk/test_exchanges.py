"""Promises of exchanges: what is sent arrives, whatever breaks on the way, and nothing is sent, or told, twice."""

import asyncio
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chainfed_ray.api.sdk import calls, clients, exchanges
from chainfed_ray.api.sdk.clients import AsyncClient, Client
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
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
def app(store: JobStore, uploads: UploadStore) -> FastAPI:
    return an_app(store, uploads=uploads)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [[], ["early"], ["lost"], ["early", "lost", "early"]])
def test_a_file_arrives_although_connections_break(
    app: FastAPI, uploads: UploadStore, file: Path, broken: list[str]
) -> None:
    app.add_middleware(Breaking, broken=broken)
    told: list[str] = []
    with served(app) as address:
        client = Client(address)
        upload = client.finish_json(exchanges.upload(file, listen=lambda activity: told.append(activity.what)))
        assert upload["complete"]
        assert client.finish_json(exchanges.upload(file)) == upload
        assert client.json(calls.list_uploads())["uploads"] == [upload]
        client.close()
    found = uploads.files("default", {"data": {"train": f"upload:{upload['id']}"}})
    assert found[upload["id"]].path.read_bytes() == ROWS
    assert told[:2] == ["reading rows.csv", "sending rows.csv: 0 %"]


@pytest.mark.slow
def test_what_the_service_refuses_is_told(app: FastAPI, store: JobStore, file: Path) -> None:
    with served(app) as address:
        client = Client(address)
        with pytest.raises(InvalidJob, match=r"name is 'rows\.exe'"):
            client.finish_json(exchanges.upload(file, "rows.exe"))
        upload = client.finish_json(exchanges.upload(file, "other.csv"))["id"]
        document = SPEC.document()
        document["data"]["test"] = f"upload:{upload}"
        job = store.submit(parse_job(document)).id
        with pytest.raises(UploadConflict, match=job):
            client.send(calls.delete_upload(upload))
        store.move(job, "cancelled")
        client.send(calls.delete_upload(upload))
        with pytest.raises(UploadNotFound, match=upload):
            client.send(calls.get_upload(upload))
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
        client = Client(address)
        with pytest.raises(InvalidJob, match=r"rows\.csv.*stays as it is"):
            client.finish_json(
                exchanges.upload(file, listen=lambda activity: shorten(activity) if first else first.append(activity))
            )
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


@pytest.mark.slow
def test_a_download_gives_up_only_if_nothing_comes(
    store: JobStore, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, content, now = store.submit(SPEC).id, b"{}" * 500, [0.0]
    storage.job(job).mkdir(parents=True, exist_ok=True)
    (storage.job(job) / "partition.json").write_bytes(content)
    monkeypatch.setattr(exchanges, "monotonic", lambda: now[0])
    monkeypatch.setattr(clients.time, "sleep", lambda seconds: None)
    digest = sha256(content).hexdigest()

    def wait() -> None:
        now[0] += 130

    for count, arrives in ((300, True), (0, False)):
        app, out = an_app(store, folder_of=storage.job), tmp_path / str(count)
        app.add_middleware(Short, count=count, wait=wait)
        with served(app) as address:
            client = Client(address)
            if arrives:
                client.finish(exchanges.download(job, "partition.json", digest, out))
                assert out.read_bytes() == content
            else:
                with pytest.raises(ServiceUnavailable):
                    client.finish(exchanges.download(job, "partition.json", digest, out))
            client.close()


class Restarting:
    """Middleware that answers the first request for an artifact as a service that starts again."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._asked = app, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""
        if "/artifacts/" in scope.get("path", ""):
            self._asked += 1
            if self._asked == 1:
                problem = {"type": "urn:chainfed:part-unavailable", "detail": "it starts", "request_id": "one"}
                return await JSONResponse(problem, 503)(scope, receive, send)
        await self._app(scope, receive, send)


def test_a_download_goes_on_when_the_service_has_started_again(
    store: JobStore, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = store.submit(SPEC).id
    storage.job(job).mkdir(parents=True, exist_ok=True)
    (storage.job(job) / "partition.json").write_bytes(ROWS)
    monkeypatch.setattr(clients.time, "sleep", lambda seconds: None)
    app = an_app(store, folder_of=storage.job)
    app.add_middleware(Restarting)
    with served(app) as address, Client(address) as client:
        client.finish(exchanges.download(job, "partition.json", sha256(ROWS).hexdigest(), tmp_path / "got"))
    assert (tmp_path / "got").read_bytes() == ROWS


def test_logs_are_followed_until_the_service_has_failed_for_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(exchanges, "monotonic", lambda: now[0])
    steps, lost = exchanges.logs("job", follow=True).steps, ServiceUnavailable("address", "why")
    next(steps)
    for _ in range(2):
        now[0] += 130  # for which a page was read
        assert isinstance(steps.throw(lost), exchanges.Pause)
        assert isinstance(next(steps), calls.Call)
        assert isinstance(steps.send({"lines": [], "next": 1, "finished": False}), calls.Call)
    assert isinstance(steps.throw(lost), exchanges.Pause)
    next(steps)
    now[0] += 130
    with pytest.raises(ServiceUnavailable):
        steps.throw(lost)


def test_an_exchange_that_gives_nothing_ends_with_none(store: JobStore, storage: Storage) -> None:
    job = store.submit(SPEC).id

    async def awaited(address: str) -> object:
        async with AsyncClient(address) as service:
            return await service.finish(exchanges.logs(job))

    with served(an_app(store, folder_of=storage.job)) as address, Client(address) as client:
        assert client.finish(exchanges.logs(job)) is None
        assert asyncio.run(awaited(address)) is None


def test_a_file_of_which_every_byte_came_and_was_not_checked_is_finished(
    app: FastAPI, uploads: UploadStore, file: Path
) -> None:
    """The process that took the last byte ended before it checked them."""
    with served(app) as address:
        client = Client(address)
        upload = uploads.begin("rows.csv", len(ROWS), sha256(ROWS).hexdigest())
        with uploads.receive(upload.id, 0) as arriving:
            arriving.append(ROWS)
        assert not client.send(calls.get_upload(upload.id)).complete
        assert client.finish_json(exchanges.upload(file))["complete"]
        client.close()


class Cut:
    """Middleware that breaks a stream of events after the second one, once, and is busy the next time."""

    def __init__(self, app: ASGIApp, asked: list[str]) -> None:
        self._app, self._asked = app, asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""
        if not scope.get("path", "").endswith("/events"):
            return await self._app(scope, receive, send)
        self._asked.append(dict(scope["headers"])[b"last-event-id"].decode())
        if len(self._asked) == 2:
            return await PlainTextResponse("", 503)(scope, receive, send)

        async def send_some(message: Message) -> None:
            if len(self._asked) == 1 and b"id: 3" in message.get("body", b""):
                raise ConnectionError("the connection breaks")
            await send(message)

        await self._app(scope, receive, send_some)


@pytest.mark.slow
def test_events_go_on_after_the_last_that_came_whoever_waits(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = store.submit(SPEC).id
    for state in ("validating", "running"):
        store.move(job, state)
    store.move(job, "failed", error={"type": "JobFailed", "message": "m"})
    monkeypatch.setattr(clients.time, "sleep", lambda seconds: None)
    now = [0.0]
    monkeypatch.setattr(exchanges, "monotonic", lambda: now[0])

    def read(kind: str) -> str:
        now[0] += 130  # whoever reads slowly is not whoever waits for a service that fails
        return kind

    async def awaited(address: str) -> list[str]:
        async with AsyncClient(address) as service:
            return [read(event.kind) async for event in service.stream(exchanges.events(job))]

    def waited(address: str) -> list[str]:
        with Client(address) as service:
            return [read(event.kind) for event in service.stream(exchanges.events(job))]

    for kinds in (waited, lambda address: asyncio.run(awaited(address))):
        app, asked = an_app(store), list[str]()
        app.add_middleware(Cut, asked=asked)
        with served(app) as address:
            assert kinds(address) == ["queued", "validating", "running", "failed"]
        assert asked == ["0", "2", "2", "4"]


@pytest.mark.slow
def test_a_file_is_sent_and_received_by_a_client_that_does_not_block(
    app: FastAPI, store: JobStore, storage: Storage, uploads: UploadStore, file: Path, tmp_path: Path
) -> None:
    job, digest = store.submit(SPEC).id, sha256(ROWS).hexdigest()
    storage.job(job).mkdir(parents=True, exist_ok=True)
    (storage.job(job) / "partition.json").write_bytes(ROWS)
    (tmp_path / f"got.{digest[:16]}.partial").write_bytes(ROWS[:100])  # of a call that was killed
    app = an_app(store, uploads=uploads, folder_of=storage.job)
    app.add_middleware(Breaking, broken=["early", "lost"])

    async def both(address: str) -> str:
        async with AsyncClient(address) as service:
            sent = await service.finish(exchanges.upload(file))
            (found,) = (await service.send(calls.list_artifacts(job))).artifacts
            await service.finish(exchanges.download(job, found.name, found.sha256, tmp_path / "got"))
            return sent.id

    with served(app) as address:
        upload = asyncio.run(both(address))
    found = uploads.files("default", {"data": {"train": f"upload:{upload}"}})
    assert (found[upload].path.read_bytes(), (tmp_path / "got").read_bytes()) == (ROWS, ROWS)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, "[]"),
        (200, "null"),
        (200, "<html>"),
        (404, '{"detail": "Not Found"}'),
        (422, '{"type": "about:blank", "detail": "no"}'),
        (422, '{"type": "urn:chainfed:problem:invalid-job", "errors": "none"}'),
        (500, '{"type": 5}'),
    ],
)
def test_another_program_at_the_address_is_said_to_be_one(status: int, body: str) -> None:
    """Many listen on port 8000."""

    async def another(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(body, status, media_type="application/json")(scope, receive, send)

    with served(another) as address, Client(address) as client:
        for asked in (exchanges.answer(calls.list_jobs()), exchanges.labels("m", ["a"]), exchanges.texts("m", ["a"])):
            with pytest.raises(ServiceUnavailable, match=r"is not one of|ended before it was whole"):
                client.finish_json(asked)
