"""Promises of the front door: who is answered, and how long a body may take."""

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.types import Message

from chainfed_ray.api.rest.errors import handle_errors
from chainfed_ray.api.serve.front_door import add_front_door


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    add_front_door(app, ["cluster.example", "*.Internal.example"])
    handle_errors(app)

    @app.post("/")
    @app.put("/v1/uploads/a/content")
    async def count(request: Request) -> int:
        return len(await request.body())

    return app


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("localhost:8000", True),
        ("api.localhost", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("10.1.2.3", True),
        ("Cluster.example", True),
        ("a.internal.example:80", True),
        ("internal.example", False),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_it_answers_to_names_that_a_web_page_cannot_give_itself(app: FastAPI, host: str, answered: bool) -> None:
    answer = TestClient(app).post("/", content=b"abc", headers={"Host": host})
    assert answer.status_code == (200 if answered else 421)
    if not answered:
        assert answer.headers["content-type"] == "application/problem+json"
        assert "CHAINFED_ALLOWED_HOSTS" in answer.json()["detail"]


def test_a_large_body_is_refused(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainfed_ray.api.serve.front_door.MOST_BYTES", 100)
    client = TestClient(app, "http://localhost")
    assert client.post("/", content=b"x" * 100).json() == 100
    answer = client.post("/", content=iter([b"x" * 60, b"x" * 60]))
    assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")


def test_half_a_body_is_not_waited_for(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainfed_ray.api.serve.front_door.BODY_SECONDS", 0.05)
    sent: list[Message] = []
    parts: list[Message] = [{"type": "http.request", "body": b"a", "more_body": True}]

    async def receive() -> Message:
        if parts:
            return parts.pop()
        await asyncio.sleep(60)
        raise AssertionError("nobody waits as long")

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(scope_of("POST", "/"), receive, send), 10))
    assert sent[0]["status"] == 408
    assert b"the body was not there" in sent[1]["body"]


def scope_of(method: str, path: str) -> dict[str, Any]:
    """A request, as a server tells of it."""
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "server": ("localhost", 80),
        "scheme": "http",
        "http_version": "1.1",
    }


@pytest.mark.parametrize(("part", "status"), [(1, 408), (100, 200)])
def test_an_upload_comes_as_slowly_as_it_may_and_no_slower(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, part: int, status: int
) -> None:
    """Of ten parts one comes every 20 s, where 100 bytes are due in 30 s."""
    monkeypatch.setattr("chainfed_ray.api.serve.front_door.LEAST_BYTES", 100)
    sent: list[Message] = []
    count = 0

    async def talk() -> None:
        loop = asyncio.get_running_loop()
        now, past = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: now() + past)

        async def receive() -> Message:
            nonlocal count, past
            count, past = count + 1, past + 20
            await asyncio.sleep(0)  # what is due by now is done
            await asyncio.sleep(0)
            return {"type": "http.request", "body": bytes(part), "more_body": count < 10}

        async def send(message: Message) -> None:
            sent.append(message)

        await app(scope_of("PUT", "/v1/uploads/a/content"), receive, send)

    asyncio.run(talk())
    assert (sent[0]["status"], count) == (status, 10 if status == 200 else 2)


def test_a_service_that_drains_refuses_further_requests() -> None:
    drains = [False]
    door = FastAPI()
    add_front_door(door, (), drains=lambda: drains[0])
    door.get("/")(lambda: "answered")
    client = TestClient(door, "http://localhost")
    assert client.get("/").json() == "answered"
    drains[0] = True
    refused = client.get("/")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert refused.json()["type"] == "urn:chainfed:problem:service-unavailable"
