"""Promises of the door: each route lets in the keys that the table names, and nobody else."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.api.serve.scopes import NEEDS, RouteNames, routes_of
from chainfed_ray.cluster.access.identity import SCOPES, Scope
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage, WithoutKeys
from tests.apps import an_app
from tests.builders import SPEC

# What a key with one scope is let in for. The table in the code says it by route; this one, by scope.
ALLOWED = {
    "read": {
        "GET /metrics", "GET /v1/jobs", "GET /v1/jobs/{job}", "GET /v1/jobs/{job}/events", "GET /v1/models",
        "GET /v1/jobs/{job}/clients",
        "GET /v1/models/{name}", "GET /v1/aliases", "GET /v1/uploads", "GET /v1/uploads/{upload}",
        "GET /v1/jobs/{job}/logs", "GET /v1/jobs/{job}/artifacts", "GET /v1/jobs/{job}/artifacts/{name}",
    },
    "submit": {
        "POST /v1/plan", "POST /v1/jobs", "POST /v1/jobs/{job}/cancel", "PUT /v1/aliases/{alias}",
        "POST /v1/jobs/{job}/pause", "POST /v1/jobs/{job}/resume",
        "POST /v1/jobs/{job}/retry", "POST /v1/jobs/{job}/clone", "DELETE /v1/jobs/{job}",
        "POST /v1/aliases/{alias}/rollback", "DELETE /v1/aliases/{alias}",
        "POST /v1/uploads", "PUT /v1/uploads/{upload}/content", "DELETE /v1/uploads/{upload}",
    },
    "infer": {
        "GET /v1/models", "GET /v1/models/{name}", "GET /v1/aliases", "POST /v1/classify", "POST /v1/completions",
        "POST /v1/chat/completions", "POST /v1/embeddings",
    },
    "site": {
        "POST /v1/site/session", "POST /v1/site/leave", "POST /v1/site/orders/next", "POST /v1/site/orders/{order}/heartbeat",
        "GET /v1/site/orders/{order}/document", "GET /v1/site/orders/{order}/tensors",
        "GET /v1/site/orders/{order}/tensors/received",
        "PUT /v1/site/orders/{order}/tensors", "POST /v1/site/orders/{order}/answer",
    },
}  # fmt: skip
OPEN = {
    "GET /healthz", "GET /readyz", "GET /openapi.json", "GET /docs", "GET /docs/oauth2-redirect",
    "GET /static-offline-docs/{path}",
}  # fmt: skip
LOCKED = sorted(NEEDS.keys() - OPEN)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('access') / 'jobs.db'}"


@pytest.fixture(scope="module")
def keys(database: str) -> Iterator[KeyStore]:
    made = KeyStore(database)
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokens(keys: KeyStore) -> dict[str, str]:
    """A token of each scope alone."""
    return {scope: keys.make_key("a", [scope], "here").token for scope in SCOPES}


@pytest.fixture(scope="module")
def app(database: str, keys: KeyStore, tokens: dict[str, str]) -> Iterator[FastAPI]:
    store = JobStore(database)
    yield an_app(store, AccessRules(KeyRing(keys), "anyone"))
    store.close()


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as made:
        yield made


def ask(client: TestClient, route: str, token: str | None) -> int:
    method, _, path = route.partition(" ")
    for name in ("job", "name", "alias"):
        path = path.replace(f"{{{name}}}", "none")
    path = path.replace("{order}", 32 * "0").replace("{upload}", 16 * "0")
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return client.request(method, path.replace("{path}", "swagger-ui.css"), headers=headers).status_code


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("route", sorted(NEEDS))
def test_each_route_lets_in_the_scopes_that_it_needs(
    client: TestClient, tokens: dict[str, str], route: str, scope: Scope
) -> None:
    as_admin = scope == "admin" and route not in ALLOWED["site"]  # a site has a name, which an admin's key lacks
    is_let_in = route in OPEN or as_admin or route in ALLOWED.get(scope, set())
    status = ask(client, route, tokens[scope])
    assert (status not in (401, 403)) == is_let_in, status
    assert is_let_in or status == 403
    assert status < 500


def test_a_site_of_another_version_is_refused_also_if_it_joined_before(
    client: TestClient, tokens: dict[str, str]
) -> None:
    session, headers = {"session": 32 * "1"}, {"Authorization": f"Bearer {tokens['site']}"}
    for path, body in (
        ("/v1/site/session", {"protocol": 1, "version": "0", **session}),
        ("/v1/site/orders/next", session),
    ):
        answer = client.post(path, json=body, headers=headers)
        assert answer.status_code == 426
        assert "the site speaks version 1 of the protocol" in answer.json()["detail"]


@pytest.mark.parametrize("route", sorted(NEEDS))
def test_without_a_key_only_what_is_open_answers(client: TestClient, route: str) -> None:
    status = ask(client, route, None)
    assert (status == 401) == (route not in OPEN)


def test_every_route_is_in_the_table(app: FastAPI) -> None:
    assert {route.name for route in routes_of(app)} == NEEDS.keys()
    documented = {f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods}
    assert documented <= NEEDS.keys()


def test_a_new_route_without_a_scope_is_noticed(store: JobStore) -> None:
    app = an_app(store)

    @app.get("/v1/secrets/{name}")
    def secret(name: str) -> str:
        return name

    with pytest.raises(LookupError, match="GET /v1/secrets"):
        RouteNames(app)


def test_what_is_no_route_is_told_to_who_has_a_key(client: TestClient, tokens: dict[str, str]) -> None:
    for path in ("/v1/none", "//healthz", "/healthz/", "/v1/jobs/a/b", "/docs/x"):
        assert ask(client, f"GET {path}", None) == 401, path
        assert ask(client, f"GET {path}", tokens["site"]) == 404, path
    assert ask(client, "PATCH /v1/jobs", tokens["site"]) == 405
    assert ask(client, "HEAD /openapi.json", None) == 200
    assert ask(client, "HEAD /v1/jobs", None) == 401


def test_a_refusal_says_what_is_missing_in_both_forms(client: TestClient, tokens: dict[str, str]) -> None:
    answer = client.post("/v1/completions", json={"model": "x", "prompt": "y"})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="chainfed"')
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (body["type"], body["error"]["code"]) == ("urn:chainfed:problem:key-missing", "key_missing")
    assert "Authorization: Bearer" in body["detail"]

    headers = {"Authorization": f"Bearer {tokens['read']}"}
    answer = client.post("/v1/completions", json={"model": "x", "prompt": "y"}, headers=headers)
    assert answer.status_code == 403
    assert 'error="insufficient_scope", scope="infer"' in answer.headers["www-authenticate"]
    assert answer.json()["error"]["message"].endswith("allows read; this needs infer")
    assert tokens["read"] not in answer.text


def test_a_key_that_has_ended_or_is_none_is_refused(client: TestClient, keys: KeyStore) -> None:
    revoked, expired = keys.make_key("a", ["read"]), keys.make_key("a", ["read"], "", timedelta(milliseconds=1))
    keys.revoke(revoked.key.id)
    while expired.key.is_valid():
        pass
    good = keys.make_key("a", ["read"]).token
    for header in (
        f"Bearer {revoked.token}",
        f"Bearer {expired.token}",
        f"Bearer {good[:-1]}",
        f"Bearer {good}0",
        f"Bearer {good} {good}",
        f"Bearer {good.upper()}",
        f"Basic {good}",
        good,
        "Bearer",
        "Bearer ",
        "",
    ):
        answer = client.get("/v1/jobs", headers={"Authorization": header})
        assert answer.status_code == 401, header
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    assert client.get("/v1/jobs", headers={"Authorization": f"bearer   {good}"}).status_code == 200, "RFC 9110"
    twice = [("Authorization", f"Bearer {good}"), ("Authorization", f"Bearer {good}")]
    assert client.get("/v1/jobs", headers=twice).status_code == 401, "which of the two is meant?"


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200) | st.binary(max_size=99).map(lambda rest: b"Bearer cfr_" + rest))
def test_any_header_is_refused_in_words(client: TestClient, header: bytes) -> None:
    answer = client.get("/v1/jobs", headers=[(b"authorization", header)])
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("without_keys", "peer", "status"),
    [
        ("nobody", "127.0.0.1", 401),
        ("loopback", "127.0.0.1", 200),
        ("loopback", "127.1.2.3", 200),
        ("loopback", "::1", 200),
        ("loopback", "10.1.2.3", 401),
        ("loopback", "somewhere", 401),
        ("anyone", "10.1.2.3", 200),
    ],
)
def test_who_is_let_in_as_long_as_no_key_was_made(
    store: JobStore, storage: object, tmp_path_factory: pytest.TempPathFactory, without_keys: WithoutKeys, peer: str,
    status: int,
) -> None:  # fmt: skip
    keys = KeyStore(f"sqlite:///{tmp_path_factory.mktemp('none') / 'jobs.db'}")
    app = an_app(store, AccessRules(KeyRing(keys, seconds=0), without_keys))
    client = TestClient(app, "http://localhost", client=(peer, 1))
    answer = client.get("/v1/jobs")
    assert answer.status_code == status
    assert status == 200 or "chainfed keys create" in answer.json()["detail"]
    keys.revoke(keys.make_site_key("hospital").key.id)
    assert client.get("/v1/jobs").status_code == 401, "closed for good, whoever came in before"
    keys.close()


class Silent(KeyStore):
    """Keys in a database that does not answer."""

    def state(self) -> tuple[int, int]:
        raise OperationalError("select", None, Exception("gone"))


def test_while_the_database_is_silent_nobody_is_let_in(store: JobStore, database: str) -> None:
    keys = Silent(database)
    client = TestClient(an_app(store, AccessRules(KeyRing(keys), "anyone")), "http://localhost")
    answer = client.get("/v1/jobs", headers={"Authorization": f"Bearer cfr_{'0' * 16}_{'0' * 64}"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.headers["content-type"] == "application/problem+json"
    assert client.get("/healthz").status_code == 200
    keys.close()


def test_no_web_socket_is_opened(client: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/v1/jobs"):
        pass
    assert closed.value.code == 1008


def test_the_document_names_the_keys_of_each_operation(app: FastAPI) -> None:
    document = app.openapi()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            name = f"{method.upper()} {path}"
            assert operation["security"] == [{"key": [scope]} for scope in NEEDS[name]], name
            assert ({"401", "403"} <= operation["responses"].keys()) == (name in LOCKED), name


def test_a_job_with_a_key_reads_less_than_one_without(store: JobStore, storage: Storage) -> None:
    keys = KeyStore(storage.database)
    client = TestClient(an_app(store, AccessRules(KeyRing(keys, seconds=0), "anyone")), "http://localhost")
    alone = client.post("/v1/jobs", json=SPEC.document()).json()["id"]
    headers = {"Authorization": f"Bearer {keys.make_key('a', ['admin']).token}"}
    shared = client.post("/v1/jobs", json=SPEC.document(), headers=headers).json()["id"]
    assert [store.get(job).reads_anything for job in (alone, shared)] == [True, False]
    keys.close()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.3", "2.4"])  # of ASGI: the answer is sent by one of two tasks, or by one
@pytest.mark.parametrize("with_key", [True, False])
def test_a_stream_ends_with_its_key(store: JobStore, storage: Storage, with_key: bool, version: str) -> None:
    """Or, if it had none, when the first key is made. It is that of the events of a job that goes on."""
    keys = KeyStore(storage.database)
    made = keys.make_key("default", ["read"]) if with_key else None
    job = store.submit(SPEC).id
    store.move(job, "running")
    app = an_app(store, AccessRules(KeyRing(keys, seconds=0), "anyone"))
    headers = {"Accept": "text/event-stream"} | ({"Authorization": f"Bearer {made.token}"} if made else {})

    async def ask() -> tuple[int, int]:
        sent: list[Message] = []
        told = asyncio.Event()

        async def send(message: Message) -> None:
            sent.append(message)
            if message.get("body"):
                told.set()

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError("the caller stays")

        scope = {
            "type": "http", "asgi": {"spec_version": version}, "http_version": "1.1", "scheme": "http", "method": "GET",
            "path": f"/v1/jobs/{job}/events", "raw_path": b"", "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "server": ("localhost", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        answering = asyncio.create_task(app(scope, receive, send))
        await told.wait()
        store.publish(job, "round-0", "round", {"index": 0})
        async with asyncio.timeout(60):
            while len(sent) < 4:
                await asyncio.sleep(0)
        count = len(sent)
        if made:
            keys.revoke(made.key.id)
        else:
            keys.make_key("a", ["read"])
        store.publish(job, "round-1", "round", {"index": 1})
        await asyncio.wait_for(answering, 60)
        assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
        return count, len(sent)

    before, after = asyncio.run(ask())
    assert after == before + 1, "nothing more is told"
    keys.close()
