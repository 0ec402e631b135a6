"""Promises of the routes in OpenAI's form: its resources, whole and as a stream, from the model that was asked for.

The application is the real one over a real database and the real deployment's class; only Ray is not there.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import jsonschema
import openai
import pytest
import torch
from fastapi.testclient import TestClient

from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.api.serve.inference import Inference
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.data.messages import Chat
from chainfed_ray.errors import PartUnavailable
from chainfed_ray.model.saved_stack import save_so_far, save_stack
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.serving.detokenizer import Detokenizer
from chainfed_ray.serving.generator import Generator
from chainfed_ray.serving.language_model import LanguageModel
from chainfed_ray.serving.messages import Embedding, ModelKey, Piece, Sampling
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job
from tests.causal import a_causal_stack, causal_folder, written

WRITER, CHATTER, CLASSIFIER = "tiny:writer", "chatty:chatter", "tiny:classifier"
ASKED = {"model": WRITER, "prompt": "tide and ", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base models of the two language models."""
    names = {"writer": "tiny", "chatter": "chatty"}
    return {
        job: causal_folder("llama", tmp_path_factory.mktemp(job) / name, chat=name == "chatty")
        for job, name in names.items()
    }


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path], tiny_data: Path) -> Storage:
    """Two language models and a classifier, as finished jobs leave them."""
    made = Storage.at(tmp_path_factory.mktemp("storage"))
    store = JobStore(made.database)
    for name in ("writer", "chatter", "classifier"):
        base = bases.get(name, bases["writer"])
        task = "sequence-classification" if name == "classifier" else "causal-lm"
        document = {
            "name": name,
            "model": {"base": f"path:{base}", "task": task},
            "data": {"train": f"path:{tiny_data}"},
            "fleet": {"clients": [{"name": "phone", "count": 4, "memory": "64MiB"}]},
            "chain": {"window": 2, "start": 0},
            "rounds": {"total": 1, "clients": 2},
        }
        job = store.submit(parse_job(document)).id
        store.move(job, "running")
        save_stack(a_causal_stack(base), made.model(job))
        store.move(job, "succeeded", result={"classes": [], "accuracy": 0.5})
    store.close()
    return made


@pytest.fixture(scope="module")
def inference(storage: Storage) -> Any:
    """The class of the deployment, without Ray around it."""
    return Inference.func_or_class(Settings(storage))


@pytest.fixture
def client(storage: Storage, inference: Any) -> Iterator[TestClient]:
    async def check(spec: JobSpec, reads_anything: bool, tenant: str) -> None:
        raise NotImplementedError

    async def plan(spec: JobSpec, reads_anything: bool, tenant: str) -> Forecast:
        raise NotImplementedError

    async def classify(model: ModelKey, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError

    async def embed(model: ModelKey, texts: list[str]) -> list[Embedding]:
        raise NotImplementedError

    def write(model: ModelKey, prompt: str | Chat, sampling: Sampling, in_pieces: bool) -> AsyncGenerator[Piece, None]:
        pieces: AsyncGenerator[Piece, None] = inference.write(model, prompt, sampling, in_pieces)
        return pieces

    store = JobStore(storage.database)
    with TestClient(
        create_app(Service(store, check, plan, classify, embed, write, {})),
        "http://localhost",
        raise_server_exceptions=False,
    ) as made:
        yield made
    store.close()


def chunks(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, each one event with nothing but data, and `[DONE]` at the end."""
    *events, last, after = text.split("\n\n")
    assert (last, after) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def greedy(base: Path, prompt: str) -> str:
    """What the generator itself writes."""
    return written(
        Generator(LanguageModel(f"path:{base}", torch.float32)), a_causal_stack(base), prompt, Sampling(8, 0)
    )[0]


@pytest.mark.slow
def test_a_completion_has_openais_form(client: TestClient, bases: dict[str, Path]) -> None:
    answer = client.post("/v1/completions", json=ASKED).json()
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", WRITER)
    text = greedy(bases["writer"], "tide and ")
    assert answer["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 8, "total_tokens": 17}
    two = client.post("/v1/completions", json={**ASKED, "prompt": ["tide and ", "salt"]}).json()
    assert [choice["index"] for choice in two["choices"]] == [0, 1]
    assert [choice["text"] for choice in two["choices"]] == [
        greedy(bases["writer"], prompt) for prompt in ("tide and ", "salt")
    ]
    assert two["usage"]["total_tokens"] == 9 + 8 + 4 + 8


@pytest.mark.slow
def test_streamed_it_is_the_same_text(client: TestClient) -> None:
    asked = {**ASKED, "prompt": ["tide and ", "salt"]}
    whole = client.post("/v1/completions", json=asked).json()
    streamed = client.post("/v1/completions", json={**asked, "stream": True, "stream_options": {"include_usage": True}})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *parts, last = chunks(streamed.text)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({(part["id"], part["created"], part["model"]) for part in parts}) == 1
    for index, choice in enumerate(whole["choices"]):
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert len(mine) > 2, "it came in pieces"
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
    assert len(chunks(client.post("/v1/completions", json={**ASKED, "stream": True}).text)) < len(parts)


@pytest.mark.slow
def test_a_stop_string_and_a_seed(client: TestClient) -> None:
    asked = {**ASKED, "temperature": 1.5, "max_tokens": 24, "seed": 3}
    first, again = (client.post("/v1/completions", json=asked).json()["choices"][0] for _ in range(2))
    assert first == again
    stop = first["text"][4:6]
    for form in (stop, ["no such", stop]):
        cut = client.post("/v1/completions", json={**asked, "stop": form}).json()["choices"][0]
        assert (cut["text"], cut["finish_reason"]) == (first["text"][: first["text"].index(stop)], "stop")


@pytest.mark.slow
def test_a_chat(client: TestClient, bases: dict[str, Path]) -> None:
    asked = {"model": CHATTER, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=asked).json()
    expected = greedy(bases["chatter"], "user: hi\nassistant:")
    assert (answer["object"], answer["choices"][0]["message"]) == (
        "chat.completion",
        {"role": "assistant", "content": expected},
    )
    parts = chunks(client.post("/v1/chat/completions", json={**asked, "stream": True}).text)
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == expected
    assert parts[-1]["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"]


def test_what_programs_for_openai_send_besides(client: TestClient) -> None:
    asked = {"model": CHATTER, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    also = {**asked, "messages": [{"role": "user", "content": parts}], "n": 1, "user": "me"}
    also["max_completion_tokens"] = also.pop("max_tokens")
    answers = [client.post("/v1/chat/completions", json=body).json() for body in (asked, also)]
    assert answers[0]["usage"]["completion_tokens"] == 4
    assert answers[0]["choices"] == answers[1]["choices"]


def test_next_to_no_temperature_is_none(client: TestClient) -> None:
    coldest, cold = (
        client.post("/v1/completions", json={**ASKED, "temperature": heat}).json()["choices"] for heat in (0, 1e-40)
    )
    assert coldest == cold


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "change", "status", "field", "expected"),
    [
        ("completions", {"model": "x:y"}, 404, None, "tiny:classifier, tiny:writer, chatty, tiny"),
        ("completions", {"model": CLASSIFIER}, 422, "model", "POST /v1/classify"),
        ("chat/completions", {"model": CLASSIFIER}, 422, "model", "POST /v1/classify"),
        ("classify", {"model": WRITER}, 422, "model", "POST /v1/completions"),
        ("chat/completions", {"model": WRITER}, 422, "messages", "no chat template"),
        ("completions", {"prompt": "x" * 5000}, 422, "prompt", "fewer than"),
        ("completions", {"prompt": "x" * 5000, "stream": True}, 422, "prompt", "fewer than"),
        ("completions", {"max_tokens": 5000}, 422, "max_tokens", "at most"),
        ("completions", {"prompt": []}, 422, "prompt", "at least 1"),
        ("completions", {"prompt": ["x"] * 17}, 422, "prompt", "at most 16"),
        ("completions", {"temperature": 3}, 422, "temperature", "less than or equal to 2"),
        ("completions", {"top_p": 0}, 422, "top_p", "greater than 0"),
        ("completions", {"stop": ["a"] * 5}, 422, "stop", "at most 4"),
        ("completions", {"stop": ""}, 422, "stop.0", "at least 1 character"),
        ("completions", {"model": "tiny:writ"}, 404, None, "did you mean tiny:writer or"),
        ("completions", {"logprobs": 21}, 422, "logprobs", "less than or equal to 20"),
        ("chat/completions", {"top_logprobs": 2}, 422, "(body)", "together with logprobs"),
        ("completions", {"echo": True}, 422, "echo", "echo is True; expected False"),
        ("completions", {"frequency_penalty": 0.5}, 422, "frequency_penalty", "less than or equal to 0"),
        ("completions", {"logit_bias": {"5": 1}}, 422, "logit_bias", "at most 0"),
        ("completions", {"guided": 1}, 422, "guided", "guided is 1; expected no field of this name"),
        ("completions", {"prompt": ["x" * 90_000] * 12}, 422, "prompt", "500,000 characters"),
        ("completions", {"prompt": [[1, 2]]}, 422, "prompt.0", "a valid string"),
        ("chat/completions", {"tools": [{"type": "function"}]}, 422, "tools", "at most 0"),
        ("chat/completions", {"response_format": {"type": "yaml"}}, 422, "response_format", "json_schema"),
        ("completions", {"n": 9}, 422, "n", "less than or equal to 8"),
        ("classify", {"model": "tiny"}, 422, "model", "a base model alone has no classes"),
        ("chat/completions", {"messages": [{"role": "user", "content": [1]}]}, 422, "messages.0.content.0", "expected"),
    ],
)
def test_what_cannot_be_asked_says_why(
    client: TestClient, path: str, change: dict[str, Any], status: int, field: str | None, expected: str
) -> None:
    asked = {
        "completions": ASKED,
        "chat/completions": {"model": CHATTER, "messages": [{"role": "user", "content": "hi"}]},
        "classify": {"model": CLASSIFIER, "texts": ["x"]},
    }[path]
    refused = client.post(f"/v1/{path}", json={**asked, **change})
    assert refused.status_code == status
    assert refused.headers["content-type"] == "application/problem+json"
    problem = refused.json()
    assert expected in problem["detail"]
    assert [found["field"] for found in problem["errors"]] == ([field] if field else [])


def test_a_stream_that_has_begun_says_what_went_wrong(storage: Storage) -> None:
    async def write(
        model: ModelKey, prompt: str | Chat, sampling: Sampling, in_pieces: bool
    ) -> AsyncGenerator[Piece, None]:
        yield Piece("salt", 4, 1)
        raise PartUnavailable("the process of the models", "ended", 5)

    store, unused = JobStore(storage.database), cast("Any", None)
    app = create_app(Service(store, unused, unused, unused, unused, write, {}))
    with TestClient(app, "http://localhost") as client:
        first, last, after = client.post("/v1/completions", json={**ASKED, "stream": True}).text.split("\n\n")
    store.close()
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == "salt"
    assert "the process of the models ended" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert after == ""


def test_models_say_their_task(client: TestClient) -> None:
    models = client.get("/v1/models").json()["models"]
    assert {model["name"]: model["task"] for model in models if model["kind"] == "stack"} == {
        WRITER: "causal-lm",
        CHATTER: "causal-lm",
        CLASSIFIER: "sequence-classification",
    }
    assert client.get(f"/v1/models/{CHATTER}").json() == next(model for model in models if model["name"] == CHATTER)
    assert client.get("/v1/models/none").status_code == 404


CHAT = [{"role": "user", "content": "hi"}]
ASKS_FOR_NOTHING: list[dict[str, Any]] = [
    {"temperature": None, "top_p": None, "stop": None, "seed": None, "n": None, "user": None, "max_tokens": None},
    {"stream": None, "stream_options": None},
    {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1},
    {"logprobs": False, "top_logprobs": None, "response_format": {"type": "text"}, "modalities": ["text"]},
    {"reasoning_effort": None, "verbosity": None, "service_tier": "auto"},
    {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [], "function_call": "auto"},
    {"store": False, "metadata": {}},
]


@pytest.fixture
def official(client: TestClient) -> openai.OpenAI:
    """OpenAI's own client. The test client is one of HTTP, and it may use that."""
    return openai.OpenAI(base_url="http://localhost/v1", api_key="any", max_retries=0, http_client=client)


@pytest.mark.slow
@pytest.mark.parametrize("options", ASKS_FOR_NOTHING)
def test_openais_client_may_say_that_it_asks_for_nothing(official: openai.OpenAI, options: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": CHATTER, "messages": CHAT, "seed": 1, "max_completion_tokens": 4}
    plain = official.chat.completions.create(**asked)
    again = official.chat.completions.create(**asked | options | {"seed": 1})
    assert again.choices == plain.choices
    assert plain.choices[0].message.content


@pytest.mark.slow
def test_openais_client_continues_a_chat(official: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": CHATTER, "max_tokens": 4, "temperature": 0}
    answer = official.chat.completions.create(messages=CHAT, **asked).choices[0].message
    more = [*CHAT, answer.model_dump(), {"role": "user", "content": "and", "name": "me"}]
    longer = official.chat.completions.create(messages=more, **asked)
    assert longer.usage is not None
    assert longer.usage.prompt_tokens > 10
    parts = list(official.chat.completions.create(messages=more, stream=True, **asked))
    assert "".join(part.choices[0].delta.content for part in parts) == longer.choices[0].message.content
    options = {"echo": False, "best_of": 1, "suffix": None, "logprobs": None}
    text = official.completions.create(model=WRITER, prompt="tide", max_tokens=4, **options).choices[0].text
    assert text


def test_openais_client_sees_models_and_reasons(official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == ["chatty", "tiny", CHATTER, CLASSIFIER, WRITER]
    assert official.models.retrieve(CHATTER).owned_by == "chainfed"
    with pytest.raises(openai.NotFoundError, match="Served now: chatty:chatter") as missing:
        official.chat.completions.create(model="none", messages=CHAT)
    assert (missing.value.code, missing.value.type) == ("model_not_found", "invalid_request_error")
    with pytest.raises(openai.UnprocessableEntityError, match="tools") as refused:
        official.chat.completions.create(model=CHATTER, messages=CHAT, tools=[{"type": "function"}])
    assert refused.value.param == "tools"
    assert "at most 0" in refused.value.message
    with pytest.raises(openai.APIError, match="fewer than"):  # at once, or in the stream
        list(official.completions.create(model=WRITER, prompt=["salt", "x" * 5000], stream=True))


def test_openais_client_that_does_not_wait(client: TestClient) -> None:
    async def story() -> tuple[list[str], str | None]:
        transport = httpx.ASGITransport(app=client.app)
        async with httpx.AsyncClient(transport=transport) as http:
            official = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="any", http_client=http)
            names = [model.id async for model in official.models.list()]
            answer = await official.chat.completions.create(model=CHATTER, messages=CHAT, max_tokens=4, temperature=0)
            return names, answer.choices[0].message.content

    names, content = asyncio.run(story())
    assert CHATTER in names
    assert content


def test_a_caller_who_goes_away_ends_the_writing(
    storage: Storage, inference: Any, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is free for the next caller at once, though thousands of tokens were asked for."""
    store = JobStore(storage.database)
    job = next(record.id for record in store.models() if record.model == WRITER)
    store.close()
    base, written, add = f"path:{bases['writer']}", list[int](), Detokenizer.add

    def counting(self: Detokenizer, token: int) -> str:
        written.append(token)
        return add(self, token)

    monkeypatch.setattr(Detokenizer, "add", counting)

    async def pieces(sampling: Sampling, at_most: int) -> list[Piece]:
        asked = inference.write(ModelKey(base, "float32", job), "tide and ", sampling, True)
        found: list[Piece] = []
        async with aclosing(asked):
            async for piece in asked:
                found.append(piece)
                if len(found) == at_most:
                    break
        return found

    async def story() -> list[list[Piece]]:
        endless = Sampling(2000, temperature=1.5, seed=1)
        left = await pieces(endless, at_most=3)
        waiting = asyncio.create_task(pieces(endless, at_most=3))
        cancelled = asyncio.create_task(pieces(endless, at_most=10_000))  # still in the queue when it is given up
        await asyncio.sleep(0)
        cancelled.cancel()
        return [left, await waiting, await pieces(Sampling(8, 0), at_most=100)]

    left, waiting, last = asyncio.run(story())
    # What comes quickly is told in one piece, so one of the two texts may have got further.
    shorter, longer = sorted(("".join(piece.text for piece in found) for found in (left, waiting)), key=len)
    assert shorter
    assert longer.startswith(shorter)
    assert last[-1].tokens == 8
    assert len(written) < 500, "of the 6000 that were asked for"


@pytest.mark.slow
def test_a_prompt_may_have_several_texts_with_their_chances(official: openai.OpenAI, client: TestClient) -> None:
    asked: dict[str, Any] = {
        "model": WRITER,
        "prompt": ["tide", "salt"],
        "max_tokens": 6,
        "seed": 3,
        "temperature": 1.5,
    }
    answer = official.completions.create(n=2, logprobs=3, **asked)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 24)
    alone = official.completions.create(**asked | {"prompt": "tide", "seed": 4})
    assert answer.choices[1].text == alone.choices[0].text, "each has a seed of its own, and is written as if alone"
    for choice in answer.choices:
        found = choice.logprobs
        assert found is not None
        assert found.tokens is not None
        assert found.top_logprobs is not None
        assert found.token_logprobs is not None
        assert len(found.tokens) == 6
        for token, logprob, likeliest in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
            assert likeliest, "those with the same text are one"
            assert max(likeliest.values()) >= logprob
            assert likeliest.get(token, logprob) >= logprob
    streamed = official.completions.create(n=2, logprobs=3, stream=True, **asked)
    told: dict[int, list[str]] = {}
    for part in streamed:
        for choice in part.choices:
            told.setdefault(choice.index, []).extend((choice.logprobs and choice.logprobs.tokens) or [])
    assert told == {choice.index: choice.logprobs and choice.logprobs.tokens for choice in answer.choices}


def test_a_chat_with_chances(official: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": CHATTER, "messages": CHAT, "max_tokens": 5, "temperature": 0}
    answer = official.chat.completions.create(n=2, logprobs=True, top_logprobs=2, **asked)
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 5
        for token in choice.logprobs.content:
            assert token.top_logprobs[0].token == token.token, "the likeliest token was taken"
            assert token.top_logprobs[0].logprob == token.logprob


def test_a_base_model_is_called_by_its_own_name(official: openai.OpenAI, bases: dict[str, Path]) -> None:
    """Beside its stacks, so that both can be compared."""
    base = "tiny"
    answer = official.completions.create(model=base, prompt="tide and ", max_tokens=8, temperature=0)
    tuned = official.completions.create(model=WRITER, prompt="tide and ", max_tokens=8, temperature=0)
    assert answer.choices[0].text != tuned.choices[0].text
    listed = official.models.retrieve(base).model_dump()
    assert (listed["kind"], listed["job"], listed["accuracy"]) == ("base", None, None)


@pytest.mark.slow
def test_a_stack_is_called_by_its_round_while_its_job_trains(
    storage: Storage, client: TestClient, official: openai.OpenAI, bases: dict[str, Path]
) -> None:
    """The newest, the best, or one of them by its number. What comes after a round moves the names, and nothing else."""
    store = JobStore(storage.database)
    document = next(record for record in store.models() if record.model == WRITER).spec | {"name": "trains"}
    job = store.submit(parse_job(document)).id
    store.move(job, "running")

    def commit(index: int, loss: float) -> None:
        last, best = (replace(a_causal_stack(bases["writer"], seed=round_), round=round_) for round_ in (index, 0))
        save_so_far({"last": last, **({"best": best} if index else {})}, storage.job(job))
        evaluation = {"loss": loss, "accuracy": 1 / loss}
        store.publish(job, f"round-{index}", "round", {"index": index, "evaluation": evaluation})

    def said(name: str) -> str:
        asked: dict[str, Any] = {"prompt": "tide and ", "max_tokens": 8, "temperature": 0}
        return str(official.completions.create(model=name, **asked).choices[0].text)

    with pytest.raises(openai.NotFoundError, match="did you mean tiny:"):
        said("tiny:trains@latest")
    store.publish(job, "started", "started", {"classes": []})
    commit(0, loss=2.0)
    first = said("tiny:trains@latest")
    assert first == said("tiny:trains@best") == said("tiny:trains@0")
    commit(1, loss=3.0)
    assert said("tiny:trains@best") == said("tiny:trains@0") == first
    assert said("tiny:trains@latest") == said("tiny:trains@1") != first
    found = client.get("/v1/models/tiny:trains@latest").json()
    assert (found["id"], found["round"], found["accuracy"]) == ("tiny:trains@1", 1, pytest.approx(1 / 3))
    commit(2, loss=4.0)
    assert client.get("/v1/models/tiny:trains@1").status_code == 404, "it is neither the newest nor the best"
    store.move(job, "failed", error={})
    store.close()


@pytest.mark.slow
def test_an_answer_in_a_form(official: openai.OpenAI) -> None:
    """Whatever the model would say: this one is random, and knows no JSON."""
    schema = {
        "type": "object",
        "properties": {"sea": {"enum": ["calm", "rough"]}, "waves": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["sea", "waves"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "report", "schema": schema, "strict": True}}
    asked: dict[str, Any] = {"model": CHATTER, "messages": CHAT, "max_tokens": 200, "n": 3, "seed": 5}
    for choice in official.chat.completions.create(response_format=wanted, **asked).choices:
        jsonschema.validate(json.loads(str(choice.message.content)), schema)
        assert choice.finish_reason == "stop"
    broken: Any = {"type": "json_schema", "json_schema": {"name": "report", "schema": {"type": "wave"}}}
    with pytest.raises(openai.UnprocessableEntityError, match="a JSON schema that can be followed") as refused:
        official.chat.completions.create(response_format=broken, **asked)
    assert refused.value.param == "response_format.json_schema.schema"


@pytest.mark.slow
def test_a_schema_that_grows_too_large_says_so(official: openai.OpenAI) -> None:
    kinds = [{"type": "array", "prefixItems": [{"type": "integer"}, {"const": number}]} for number in range(2500)]
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "many", "schema": {"anyOf": kinds}}}
    with pytest.raises(openai.UnprocessableEntityError, match="followed") as refused:
        official.chat.completions.create(model=CHATTER, messages=CHAT, max_tokens=20, response_format=wanted)
    assert refused.value.param == "response_format.json_schema.schema"
