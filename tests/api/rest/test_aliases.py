"""Names that callers keep while the models behind them change."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient

from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.aliases import Aliases
from chainfed_ray.serving.messages import ModelKey
from chainfed_ray.spec.parse import parse_job

OLD, NEW = "tiny:old", "tiny:new"


@pytest.fixture
def asked() -> list[str | None]:
    """The jobs whose models were asked."""
    return []


@pytest.fixture
def client(document: dict[str, Any], asked: list[str | None], tmp_path: Path) -> Iterator[TestClient]:
    async def classify(model: ModelKey, texts: list[str]) -> list[list[float]]:
        asked.append(model.job)
        return [[0.7, 0.2, 0.1]] * len(texts)

    store, unused = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}"), cast("Any", None)
    for name in ("old", "new"):
        job = store.submit(parse_job(document | {"name": name})).id
        store.move(job, "running")
        store.move(job, "succeeded", result={"classes": ["sea", "sky", "soil"], "accuracy": 0.5})
    app = create_app(Service(store, unused, unused, classify, unused, unused, {}))
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as made:
        yield made
    store.close()


def answered_by(client: TestClient, count: int = 1) -> Counter[str]:
    answers = (client.post("/v1/classify", json={"model": "support", "texts": ["x"]}).json() for _ in range(count))
    return Counter(answer["model"] for answer in answers)


def put(client: TestClient, targets: dict[str, float]) -> int:
    return client.put("/v1/aliases/support", json={"targets": targets}).status_code


@pytest.mark.slow
def test_an_alias_moves_and_returns(client: TestClient, asked: list[str | None]) -> None:
    assert put(client, {OLD: 1}) == 200
    assert answered_by(client) == {OLD: 1}
    assert put(client, {NEW: 1}) == 200
    assert answered_by(client) == {NEW: 1}
    assert len(set(asked)) == 2
    assert client.get("/v1/aliases").json() == {"aliases": [{"name": "support", "targets": {NEW: 1.0}}]}
    assert client.post("/v1/aliases/support/rollback").json()["targets"] == {OLD: 1.0}
    assert answered_by(client) == {OLD: 1}
    assert client.post("/v1/aliases/support/rollback").status_code == 404, "there was nothing before"
    gone = client.delete("/v1/aliases/support")
    assert (gone.status_code, gone.content, gone.headers.get("content-type")) == (204, b"", None)
    assert client.post("/v1/classify", json={"model": "support", "texts": ["x"]}).status_code == 404
    assert client.delete("/v1/aliases/support").status_code == 404


@pytest.mark.parametrize("target", [OLD, "tiny"])
def test_a_job_that_is_deleted_while_an_alias_is_made_for_its_model(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Another job that serves under the name is found, or the alias is refused."""
    jobs = {model["name"]: model["job"] for model in client.get("/v1/models").json()["models"]}
    known, deleted = Aliases.set, [jobs[OLD] if target == OLD else jobs[NEW]]

    def after_a_deletion(self: Aliases, *given: Any) -> None:
        while deleted:
            assert client.delete(f"/v1/jobs/{deleted.pop()}").status_code == 204
        known(self, *given)

    monkeypatch.setattr(Aliases, "set", after_a_deletion)
    answer = client.put("/v1/aliases/support", json={"targets": {target: 1}})
    if target == OLD:
        assert (answer.status_code, answer.json()["type"]) == (404, "urn:chainfed:problem:model-not-found")
        assert client.get("/v1/aliases").json() == {"aliases": []}
    else:
        assert answer.status_code == 200
        refused = client.delete(f"/v1/jobs/{jobs[OLD]}")
        assert (refused.status_code, refused.json()["type"]) == (409, "urn:chainfed:problem:job-conflict")


@pytest.mark.slow
def test_an_alias_returns_to_nothing_that_is_deleted(client: TestClient) -> None:
    jobs = {model["name"]: model["job"] for model in client.get("/v1/models").json()["models"]}
    assert put(client, {OLD: 1}) == put(client, {NEW: 1}) == 200
    assert client.delete(f"/v1/jobs/{jobs[OLD]}").status_code == 204
    assert client.post("/v1/aliases/support/rollback").status_code == 404
    assert answered_by(client) == {NEW: 1}


def test_an_alias_for_what_a_job_serves_that_still_trains_says_when_that_has_failed(
    document: dict[str, Any], tmp_path: Path
) -> None:
    unused = cast("Any", None)

    async def classify(model: ModelKey, texts: list[str]) -> list[list[float]]:
        return [[0.7, 0.2, 0.1]] * len(texts)

    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    job = store.submit(parse_job(document | {"name": "new"})).id
    app = create_app(Service(store, unused, unused, classify, unused, unused, {}))
    with closing(store), TestClient(app, "http://localhost") as client:
        assert put(client, {"tiny": 1}) == 404, "whether there is such a base model is not known yet"
        store.move(job, "running")
        assert (put(client, {"tiny": 1}), put(client, {"tiny:new@latest": 1})) == (200, 404), "no round has counted"
        assert client.get("/v1/models/support").json()["name"] == "tiny"
        store.publish(job, "started", "started", {"classes": ["sea", "sky", "soil"]})
        store.publish(job, "round-0", "round", {"index": 0})
        assert put(client, {"tiny:new@latest": 1}) == 200
        assert answered_by(client) == {"tiny:new@0": 1}
        store.move(job, "failed", error={})
        refused = client.post("/v1/classify", json={"model": "support", "texts": ["x"]})
        assert (refused.status_code, refused.json()["type"]) == (404, "urn:chainfed:problem:model-not-found")
        said = "there is no model 'tiny:new@latest', for which the alias 'support' stands"
        assert refused.json()["detail"] == f"{said}. Served now: none", "and not that alias"
        store.move(job, "queued")  # tried again
        assert answered_by(client) == {"tiny:new@0": 1}


@pytest.mark.slow
def test_a_share_of_the_requests_tries_a_new_model(client: TestClient) -> None:
    assert put(client, {OLD: 0.8, NEW: 0.2}) == 200
    found = answered_by(client, 200)
    assert found[OLD] + found[NEW] == 200
    assert 10 < found[NEW] < 80, "a fifth; less often than once in a million runs it is outside"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alias", "targets", "status", "words"),
    [
        ("support", {}, 422, "at least 1"),
        ("support", {OLD: 0.5, NEW: 0.4}, 422, "these are 0.9"),
        ("support", {OLD: -1, NEW: 2}, 422, "greater than 0"),
        ("support", {"tiny:none": 1}, 404, "there is no model"),
        ("support", {"other": 1}, 422, "names of models, not of aliases"),
        ("tiny", {OLD: 1}, 422, "a name that no base model has"),
        ("with:colon", {OLD: 1}, 422, "alias"),
        ("UPPER", {OLD: 1}, 422, "alias"),
    ],
)
def test_what_no_alias_can_be_says_why(
    client: TestClient, alias: str, targets: dict[str, float], status: int, words: str
) -> None:
    assert client.put("/v1/aliases/other", json={"targets": {OLD: 1}}).status_code == 200
    refused = client.put(f"/v1/aliases/{alias}", json={"targets": targets})
    assert refused.status_code == status
    assert words in refused.json()["detail"]
    assert [found["name"] for found in client.get("/v1/aliases").json()["aliases"]] == ["other"]
