"""Promises of the OpenAPI document, which programs read, and of the page that shows it."""

import json
import re
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from pydantic import TypeAdapter, ValidationError

from chainfed_ray.api.rest.errors import MEDIA_TYPE
from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.schemas.completions import CompletionRequest
from chainfed_ray.api.schemas.monitoring import Health
from chainfed_ray.api.schemas.problems import ProblemDetails
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.spec.sections import RoundsSpec


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(create_app(cast("Service", None)), "http://localhost")


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


@pytest.mark.slow
def test_programs_have_names_for_the_operations(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(names)) == len(names)
    assert {"submit_job", "list_jobs", "get_job", "cancel_job", "plan_job", "list_events", "chat_completions"} <= set(
        names
    )


def test_bodies_have_an_example_that_their_model_takes(document: dict[str, Any], client: TestClient) -> None:
    """Nobody writes the bodies of sites' routes by hand. Of answers, those to the others have one, but for those about jobs."""
    parts, shown = document["components"]["schemas"], set[str]()

    def check(model: Any, content: dict[str, Any]) -> None:
        schema = content["schema"]
        found = [content["example"]] if "example" in content else schema.get("examples")
        for given in found or parts[schema["$ref"].rpartition("/")[2]]["examples"]:
            TypeAdapter(model).validate_json(json.dumps(given))
        shown.add(model.__name__)

    for context in iter_route_contexts(cast("FastAPI", client.app).routes):
        route: Any = context
        if not (route.methods or set()) & {"POST", "PUT"} or "/v1/site/" in route.path:
            continue
        (method,) = route.methods
        operation = operations(document)[f"{method} {route.path.replace(':path', '')}"]
        if route.body_field:
            check(route.body_field.field_info.annotation, operation["requestBody"]["content"]["application/json"])
            answer = operation["responses"][str(route.status_code or 200)]
            check(route.response_model, answer["content"]["application/json"])
        else:  # a file, or what a route reads itself
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                assert "example" in content or kind == "application/octet-stream", (route.path, kind)
    check(ProblemDetails, operations(document)["GET /v1/jobs"]["responses"]["404"]["content"][MEDIA_TYPE])
    check(Health, operations(document)["GET /readyz"]["responses"]["200"]["content"]["application/json"])
    asked = {"ClassifyRequest", "EmbeddingRequest", "CompletionRequest", "ChatRequest", "NewUpload", "AliasTargets"}
    assert asked <= shown, "the routes were looked at"


@pytest.mark.slow
def test_every_error_is_a_problem(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        responses = operation["responses"]
        assert {"404", "405", "421", "422", "429", "500", "502", "503", "504"} <= set(responses), name
        for status, response in responses.items():
            if status >= "400" and (name, status) != ("GET /readyz", "503"):
                assert set(response["content"]) == {"application/problem+json"}, (name, status)
        assert all("Retry-After" in responses[status].get("headers", {}) for status in ("429",)), name
        assert ("413" in responses) == ("requestBody" in operation), name
        takes_a_tag = any(given["name"] == "if-match" for given in operation.get("parameters", ()))
        assert (
            ("412" in responses)
            == takes_a_tag
            == (operation["tags"] == ["jobs"] and "{job}" in name and "GET" not in name)
        )
    assert "204" in operations(document)["GET /v1/jobs/{job}/events"]["responses"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_what_is_refused_has_bounds_that_are_exact(document: dict[str, Any]) -> None:
    parts = document["components"]["schemas"]
    seed = parts["CompletionRequest"]["properties"]["seed"]["anyOf"][0]
    assert (seed["minimum"], seed["maximum"]) == (0, 2**63 - 1)
    *_, as_text = parts["RoundsSpec"]["properties"]["deadline"]["anyOf"]
    assert re.search(as_text["pattern"], "5m")
    assert not re.search(as_text["pattern"], "5 days")
    assert RoundsSpec(deadline="5m").deadline == 300  # type: ignore[arg-type]


def test_the_page_that_shows_it_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    loaded = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text)
    assert any(path.endswith(".js") for path in loaded)
    for path in loaded:
        assert path.startswith("/")
        assert client.get(path).status_code == 200


def test_every_answer_has_its_headers_and_its_form(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        for status, response in operation["responses"].items():
            headers = response["headers"]
            assert "X-Request-ID" in headers, (name, status)
            assert ("Location" in headers) == (status == "201"), (name, status)
            assert all("schema" in content for content in response.get("content", {}).values()), (name, status)
        for parameter in operation.get("parameters", ()):
            assert parameter.get("description"), (name, parameter["name"])
    sent = operations(document)["GET /v1/jobs/{job}/artifacts/{name}"]["responses"]
    assert {"application/octet-stream", "application/json", "image/png", "text/plain"} <= set(sent["200"]["content"])
    assert {"ETag", "Content-Range"} <= set(sent["206"]["headers"])


def test_one_text_or_some_have_the_bounds_that_are_kept(document: dict[str, Any]) -> None:
    parts = document["components"]["schemas"]
    for part, field, most in (("CompletionRequest", "prompt", 16), ("EmbeddingRequest", "input", 256)):
        text, texts = parts[part]["properties"][field]["anyOf"]
        assert (text["maxLength"], texts["maxItems"], texts["items"]) == (100_000, most, text)
    text, texts, nothing = parts["CompletionRequest"]["properties"]["stop"]["anyOf"]
    assert (text["maxLength"], texts["maxItems"], nothing) == (1000, 4, {"type": "null"})
    for wrong in ({"stop": ["x"] * 5}, {"stop": "x" * 1001}, {"stop": ""}, {"prompt": ["x"] * 17}, {"prompt": []}):
        with pytest.raises(ValidationError):
            CompletionRequest.model_validate({"model": "m", "prompt": "x", **wrong})
