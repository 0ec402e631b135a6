"""Promises of the typed client: its calls are the operations of the OpenAPI document, and both ways of sending them agree."""

import asyncio
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest

from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.sdk import calls
from chainfed_ray.api.sdk.clients import AsyncClient, Client
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.errors import ChainFedError, InvalidJob, JobConflict, JobNotFound, ModelNotFound, ServiceUnavailable
from chainfed_ray.spec.parse import parse_job
from tests.apps import an_app, served
from tests.builders import SPEC
from tests.project import ROOT

CALLS = {
    name: made
    for name, made in inspect.getmembers(calls, inspect.isfunction)
    if made.__module__ == calls.__name__ and not name.startswith("_")
}
# Of sites, which have a client of their own; of bytes and text, which have no model; and one for programs of OpenAI's form.
OTHERS = {
    "join_site", "leave_site", "next_order", "hear_order", "get_order_document", "get_order_tensors", "put_answer_tensors",
    "get_received",
    "answer_order", "get_artifact", "metrics", "healthz", "embeddings",
}  # fmt: skip


@pytest.fixture
def address(store: JobStore) -> Iterator[str]:
    with served(an_app(store)) as found:
        yield found


def an_example(name: str) -> calls.Call[Any]:
    """A call, each of its arguments that must be given being its own name, or a document."""
    documents = {
        "document": {}, "changes": {}, "targets": {}, "texts": ["a"], "prompts": ["a"], "messages": [], "size": 1, "offset": 0,
        "content": iter([b"a"]),
    }  # fmt: skip
    needed = [one.name for one in inspect.signature(CALLS[name]).parameters.values() if one.default is one.empty]
    return cast(
        "calls.Call[Any]", CALLS[name](*(documents.get(one, f"{{{one}}}") for one in needed if one != "options"))
    )


@pytest.mark.slow
def test_every_call_is_an_operation_of_the_document_and_gives_its_model() -> None:
    document = create_app(cast("Service", None)).openapi()
    operations = {
        operation["operationId"]: (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert CALLS.keys() | OTHERS == operations.keys()
    for name in CALLS:
        call, (method, path, operation) = an_example(name), operations[name]
        quoted = re.sub(r"%7B(\w+)%7D", r"{\1}", call.path)
        assert (call.operation, call.method, quoted) == (name, method, path)
        assert {*call.parameters} <= {one["name"] for one in operation.get("parameters", ())}
        answer = next(found for status, found in operation["responses"].items() if status.startswith("2"))
        schema = answer.get("content", {}).get("application/json", {}).get("schema")
        model = call.answer.name
        assert schema == ({"$ref": f"#/components/schemas/{model}"} if model else None)
        assert not model or inspect.signature(CALLS[name]).return_annotation == f"Call[{model}]"
        assert (call.body is not None or call.content is not None) <= ("requestBody" in operation)


@pytest.mark.slow
def test_both_ways_give_the_same(address: str, store: JobStore) -> None:
    document = SPEC.document()
    with Client(address) as service:
        job = service.send(calls.submit_job(document))
        assert (job.status, job.spec) == ("queued", document)
        assert service.send(calls.cancel_job(job.id)).status == "cancelled"
        store.submit(SPEC)
        asked = [calls.get_job(job.id), calls.list_jobs(state=["cancelled"]), calls.list_events(job.id)]
        here = [service.send(call) for call in asked]
        refused: list[tuple[calls.Call[Any], type[ChainFedError]]] = [
            (calls.get_job("none"), JobNotFound),
            (calls.pause_job(job.id), JobConflict),
            (calls.submit_job({}), InvalidJob),
        ]
        for call, error in refused:
            with pytest.raises(error):
                service.send(call)

    async def there() -> list[Any]:
        async with AsyncClient(address) as service:
            for call, error in refused:
                with pytest.raises(error):
                    await service.send(call)
            found = await asyncio.gather(*map(service.send, asked))
            assert await service.send(calls.delete_job(job.id)) is None
            return found

    assert asyncio.run(there()) == here
    with Client("http://127.0.0.1:1") as service, pytest.raises(ServiceUnavailable):
        service.send(calls.list_jobs())


@pytest.mark.slow
def test_an_alias_whose_model_is_gone_is_named_with_that_model(address: str, store: JobStore) -> None:
    kept, job = (store.submit(parse_job(SPEC.document() | {"name": name})) for name in ("intents", "gone"))
    for one in (kept, job):
        store.move(one.id, "running")
    store.move(kept.id, "succeeded", result={"classes": ["sea", "sky"], "accuracy": 0.5})
    store.publish(job.id, "started", "started", {"classes": ["sea", "sky"]})
    store.publish(job.id, "round-0", "round", {"index": 0})
    with Client(address) as service:
        service.send(calls.set_alias("support", {f"{job.model}@latest": 1}))
        store.move(job.id, "failed", error={})
        for asked in (calls.get_model("support"), calls.classify("support", ["a"])):
            with pytest.raises(ModelNotFound) as refused:
                service.send(asked)
            error = refused.value
            assert (error.model, error.alias) == ("minilm:gone@latest", "support")
            assert str(error).startswith(
                "there is no model 'minilm:gone@latest', for which the alias 'support' stands; did"
            )
            assert str(error).endswith("Served now: minilm, minilm:intents")
        with pytest.raises(ModelNotFound, match=r"^there is no model 'none'\. "):
            service.send(calls.get_model("none"))


def test_only_a_text_that_is_written_may_take_any_time() -> None:
    assert {name for name in CALLS if an_example(name).seconds is None} == {"completions", "chat_completions"}
    assert an_example("classify").seconds == 150


def test_models_are_listed_in_pages_as_well() -> None:
    assert calls.list_models(10, "gpt2:recipes").parameters == {"limit": 10, "after": "gpt2:recipes"}


@pytest.mark.slow
def test_it_loads_neither_torch_nor_ray() -> None:
    code = "import sys, chainfed_ray.api.sdk.clients; assert not {'torch', 'ray', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
