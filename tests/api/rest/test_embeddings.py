"""Texts as vectors, by OpenAI's own client."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import openai
import pytest
from fastapi.testclient import TestClient

from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.serving.engine import Engine
from chainfed_ray.serving.messages import Embedding, ModelKey, Question
from chainfed_ray.spec.parse import parse_job


@pytest.fixture
def official(document: dict[str, Any], tiny_model_folder: Path, tmp_path: Path) -> Iterator[openai.OpenAI]:
    engine, store, unused = (
        Engine(lambda model: tmp_path, 2**30),
        JobStore(f"sqlite:///{tmp_path / 'jobs.db'}"),
        cast("Any", None),
    )

    async def embed(model: ModelKey, texts: list[str]) -> list[Embedding]:
        (answer,) = engine.embed([Question(model, texts)])
        if isinstance(answer, Exception):
            raise answer
        return answer

    store.move(store.submit(parse_job(document)).id, "running")
    with TestClient(create_app(Service(store, unused, unused, unused, embed, unused, {})), "http://localhost") as http:
        yield openai.OpenAI(base_url="http://localhost/v1", api_key="any", max_retries=0, http_client=http)
    store.close()


@pytest.mark.slow
def test_openais_client_embeds(official: openai.OpenAI) -> None:
    """It asks for base64 by itself, and unpacks that."""
    texts = ["salt tide", "worm", "salt tide"]
    answer = official.embeddings.create(model="tiny", input=texts)
    plain = official.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert answer.data[0].embedding == answer.data[2].embedding != answer.data[1].embedding
    for packed, entry in zip(answer.data, plain.data, strict=True):
        assert packed.embedding == pytest.approx(entry.embedding)
        assert sum(number**2 for number in entry.embedding) == pytest.approx(1)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > len(texts)
    alone = official.embeddings.create(model="tiny", input="worm", encoding_format="float")
    assert alone.data[0].embedding == pytest.approx(plain.data[1].embedding, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "field"), [({"dimensions": 4}, "dimensions"), ({"input": []}, "input"), ({"input": [1, 2]}, "input.0")]
)
def test_what_cannot_be_embedded_says_why(official: openai.OpenAI, change: dict[str, Any], field: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": ["x"]}
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        official.embeddings.create(**asked | change)
    assert refused.value.param == field


def test_a_base_with_quantized_matrices_is_asked_by_its_own_name(document: dict[str, Any], tmp_path: Path) -> None:
    asked, unused = list[ModelKey](), cast("Any", None)

    async def embed(model: ModelKey, texts: list[str]) -> list[Embedding]:
        asked.append(model)
        return [Embedding([1.0], 1) for _ in texts]

    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    document["model"]["quantization"] = "nf4"
    store.move(store.submit(parse_job(document)).id, "running")
    with TestClient(create_app(Service(store, unused, unused, unused, embed, unused, {})), "http://localhost") as http:
        assert http.post("/v1/embeddings", json={"model": "tiny-nf4", "input": "worm"}).status_code == 200
        assert http.post("/v1/embeddings", json={"model": "tiny", "input": "worm"}).status_code == 404
    store.close()
    assert [model.base for model in asked] == [f"{document['model']['base']}#nf4"]
