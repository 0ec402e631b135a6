"""Promises about requests that ask for what cannot be: each is refused in words, none is a mistake of ours."""

import json
import re
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from benchmarks.hostile_requests import HostileRequest, hostile_requests
from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.planning.dry_run import dry_run
from chainfed_ray.planning.prepare import prepare_job
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.serving.messages import Embedding, ModelKey, Piece, Sampling
from chainfed_ray.spec.job import JobSpec

_MOST_ANSWERED = 64 * 2**10  # bytes


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The real application over a real database, with real checks, and no model."""

    async def check(spec: JobSpec, reads_anything: bool, tenant: str) -> None:
        prepare_job(spec, Path())

    async def plan(spec: JobSpec, reads_anything: bool, tenant: str) -> Forecast:
        return dry_run(spec, at_once=1)

    async def classify(model: ModelKey, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError

    async def embed(model: ModelKey, texts: list[str]) -> list[Embedding]:
        raise NotImplementedError

    def write(model: ModelKey, prompt: object, sampling: Sampling, in_pieces: bool) -> AsyncGenerator[Piece, None]:
        raise NotImplementedError

    store = JobStore(f"sqlite:///{tmp_path_factory.mktemp('store') / 'jobs.db'}")
    app = create_app(Service(store, check, plan, classify, embed, write, {}))
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as made:
        yield made
    store.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "key", "value"),
    [
        ("POST", "/v1/classify", '{"model": "a", "texts": ["x"], "model": "b"}', "model", "'b'"),
        ("POST", "/v1/uploads", '{"name": "a.csv", "bytes": 1, "bytes": 2}', "bytes", "2"),
        ("POST", "/v1/chat/completions", '{"model": "a", "messages": [{"role": "user", "role": "x"}]}', "role", "'x'"),
        ("POST", "/v1/jobs", '{"name": "a", "seed": 1, "seed": 2}', "seed", "2"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_in_every_body(
    client: TestClient, method: str, path: str, body: str, key: str, value: str
) -> None:
    answer = client.request(method, path, headers={"content-type": "application/json"}, content=body)
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"field": key, "value": value, "expected": "a key that is given once"}]


@pytest.mark.slow
def test_every_route_with_a_body_reads_it_so(client: TestClient) -> None:
    found = {
        (method, path): kind
        for path, operations in client.get("/openapi.json").json()["paths"].items()
        for method, operation in operations.items()
        for kind in operation.get("requestBody", {}).get("content", {})
        if kind.endswith("json")
    }
    assert len(found) > 8
    for (method, path), kind in found.items():
        place = re.sub("{.*?}", "a", path)
        answer = client.request(method, place, headers={"content-type": kind}, content='{"z": 1, "z": 2}')
        assert answer.json().get("errors") == [{"field": "z", "value": "2", "expected": "a key that is given once"}], (
            path
        )


@pytest.mark.slow
@pytest.mark.parametrize("request_", list(hostile_requests()), ids=lambda request: f"{request.method}-{request.what}")
def test_it_is_refused_in_words(client: TestClient, request_: HostileRequest) -> None:
    _, method, path, headers, body = request_
    answer = client.request(method, path, headers=dict(headers), content=body)
    assert 400 <= answer.status_code < 500, answer.text[:500]
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < _MOST_ANSWERED
    if method != "HEAD":
        assert answer.json()["status"] == answer.status_code


@pytest.mark.parametrize(
    "name", ["\ud800:x", "x" * 100_000, f"x:{'x' * 100_000}"], ids=["half-a-pair", "long", "long-job"]
)
@pytest.mark.parametrize(
    ("method", "path", "asked"),
    [
        ("POST", "/v1/classify", {"texts": ["a"]}),
        ("POST", "/v1/embeddings", {"input": "a"}),
        ("POST", "/v1/completions", {"prompt": "a"}),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("PUT", "/v1/aliases/a", None),
    ],
)
def test_no_database_is_asked_for_what_is_no_name(
    client: TestClient, method: str, path: str, asked: dict[str, object] | None, name: str
) -> None:
    body = {"targets": {name: 1.0}} if asked is None else {**asked, "model": name}
    headers = {"Content-Type": "application/json"}
    assert client.request(method, path, headers=headers, content=json.dumps(body)).status_code == 422
    if name.isascii():
        assert client.get(f"/v1/models/{name[:60_000]}").status_code == 404
