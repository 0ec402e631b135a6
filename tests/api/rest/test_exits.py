"""Early exits are models with names of their own: listed with their scores, called, and refused by what there is."""

from collections.abc import AsyncGenerator, Iterator
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient

from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.serving.messages import Embedding, ModelKey, Piece, Sampling
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_round, a_start

SCORES = [
    {"layers": 2, "round": 1, "loss": 0.9, "accuracy": 0.25},
    {"layers": 3, "round": 4, "loss": 0.8, "accuracy": 0.5},
]


@pytest.fixture
def asked() -> list[ModelKey]:
    """The models that were asked."""
    return []


@pytest.fixture
def client(document: dict[str, Any], asked: list[ModelKey], store: JobStore) -> Iterator[TestClient]:
    async def classify(model: ModelKey, texts: list[str]) -> list[list[float]]:
        asked.append(model)
        return [[0.7, 0.2, 0.1]] * len(texts)

    async def embed(model: ModelKey, texts: list[str]) -> list[Embedding]:
        asked.append(model)
        return [Embedding([1.0], 1)] * len(texts)

    async def write(
        model: ModelKey, prompt: object, sampling: Sampling, in_pieces: bool
    ) -> AsyncGenerator[Piece, None]:
        asked.append(model)
        yield Piece("so", 1, 1, "stop")

    writer = document | {"name": "writer", "model": document["model"] | {"task": "causal-lm"}}
    for own in (document | {"name": "whole"}, document | {"name": "cut"}, writer | {"chain": {"window": 1}}):
        job = store.submit(parse_job(own)).id
        store.move(job, "running")
        result = {"classes": ["sea", "sky", "soil"], "accuracy": 0.75} | (
            {"exits": SCORES} if own["name"] != "whole" else {}
        )
        store.move(job, "succeeded", result=result)
    unused = cast("Any", None)
    app = create_app(Service(store, unused, unused, classify, embed, write, {}))
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as made:
        yield made


def classified(client: TestClient, model: str) -> tuple[int, str]:
    answer = client.post("/v1/classify", json={"model": model, "texts": ["x"]})
    return answer.status_code, answer.json()["model"] if answer.status_code == 200 else answer.json()["detail"]


@pytest.mark.slow
def test_exits_are_listed_with_their_scores_and_answer_by_name(client: TestClient, asked: list[ModelKey]) -> None:
    models = client.get("/v1/models").json()
    assert {entry["id"] for entry in models["data"]} >= {"tiny:cut", "tiny:cut#layers=2", "tiny:writer#layers=3"}
    found = {model["name"]: model for model in models["models"]}
    exit, whole = found["tiny:cut#layers=3"], found["tiny:cut"]
    assert (exit["layers"], exit["round"], exit["accuracy"], exit["job"]) == (3, 4, 0.5, whole["job"])
    assert (whole["layers"], whole["accuracy"]) == (None, 0.75)
    assert not [name for name in found if name.startswith("tiny:whole#")]
    assert client.get("/v1/models/tiny:cut%23layers=3").json() == exit

    assert classified(client, "tiny:cut#layers=2") == (200, "tiny:cut#layers=2")
    client.post("/v1/embeddings", json={"model": "tiny:cut#layers=3", "input": ["x"]})
    for path, body in (
        ("completions", {"prompt": "x"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        answer = client.post(f"/v1/{path}", json={"model": "tiny:writer#layers=2"} | body)
        assert (answer.status_code, answer.json()["model"]) == (200, "tiny:writer#layers=2")
    assert [key.layers for key in asked] == [2, 3, 2, 2]
    assert asked[0].job == whole["job"]


@pytest.mark.slow
def test_pages_together_are_the_whole_list(client: TestClient) -> None:
    whole = client.get("/v1/models").json()
    names = [model["id"] for model in whole["data"]]
    assert (len(names), whole["has_more"]) == (8, False)
    for limit in (1, 2, 3, 8, 1000):
        found, after, more = list[str](), None, True
        while more:
            page = client.get("/v1/models", params={"limit": limit} | ({"after": after} if after else {})).json()
            assert [model["name"] for model in page["models"]] == [entry["id"] for entry in page["data"]]
            assert 1 <= len(page["data"]) <= limit
            found += [entry["id"] for entry in page["data"]]
            after, more = found[-1], page["has_more"]
        assert found == names
    assert client.get("/v1/models", params={"limit": 2, "after": "tiny:d"}).json()["data"] == whole["data"][4:6]
    for wrong in ({"limit": 0}, {"limit": "all"}, {"limit": 1001}):
        assert client.get("/v1/models", params=wrong).status_code == 422


REFUSED = (
    ("tiny:cut#layers=4", 422, "tiny:cut#layers=2 or tiny:cut#layers=3, or without #layers the whole model"),
    ("tiny:whole#layers=2", 422, "this model has no early exits"),
    ("tiny:cut@best#layers=2", 422, "@latest or nothing before #layers"),
    ("tiny:cut@7#layers=2", 422, "@latest or nothing before #layers"),
    ("tiny#layers=2", 422, "only a model that a job trained has early exits"),
    ("tiny:cutt#layers=2", 404, "there is no model"),
    ("tiny:cut#layers=two", 404, "there is no model"),
    ("tiny:cut#layers=", 404, "there is no model"),
    ("tiny:cut@latest#layers=2", 404, "there is no model"),
    ("tiny:writer#layers=2", 422, "this one is for causal-lm"),
)


@pytest.mark.slow
def test_an_exit_that_is_none_is_refused_by_those_there_are(client: TestClient) -> None:
    for model, status, words in REFUSED:
        found, detail = classified(client, model)
        assert (found, words in detail) == (status, True), detail


@pytest.mark.slow
def test_an_exit_answers_while_its_job_trains(
    client: TestClient, store: JobStore, document: dict[str, Any], asked: list[ModelKey]
) -> None:
    job = store.submit(parse_job(document | {"name": "trains"})).id
    store.move(job, "running")
    started = a_start(layers=4, start=0)
    store.publish(job, "started", "started", started.model_dump(mode="json") | {"classes": ["sea", "sky", "soil"]})
    for index, layer in enumerate((1, 1, 2, 3)):
        record = a_round(index, started, exit=layer, top=layer)
        store.publish(job, f"round-{index}", "round", record.model_dump(mode="json"))
    model = client.get("/v1/models/tiny:trains@latest%23layers=2").json()
    assert (model["layers"], model["round"], model["accuracy"]) == (2, 1, 0.51)
    assert classified(client, "tiny:trains@latest#layers=3") == (200, "tiny:trains@latest#layers=3")
    assert (asked[0].job, asked[0].layers) == (job, 3)
    status, detail = classified(client, "tiny:trains@latest#layers=4")
    assert (status, "tiny:trains@latest#layers=2 or tiny:trains@latest#layers=3" in detail) == (422, True), detail
    assert classified(client, "tiny:trains#layers=2")[0] == 404, "it has not succeeded"


def test_an_alias_stands_for_an_exit_and_keeps_its_job(client: TestClient, asked: list[ModelKey]) -> None:
    assert client.put("/v1/aliases/fast", json={"targets": {"tiny:cut#layers=2": 1}}).status_code == 200
    assert classified(client, "fast") == (200, "tiny:cut#layers=2")
    assert classified(client, "fast#layers=2")[0] == 422
    refused = client.delete(f"/v1/jobs/{asked[0].job}")
    assert (refused.status_code, "the alias fast stands for its model" in refused.json()["detail"]) == (409, True)
    assert client.put("/v1/aliases/fast", json={"targets": {"tiny:cut#layers=4": 1}}).status_code == 422
