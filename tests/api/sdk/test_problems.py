"""Promise: the typed client raises the error that the service meant."""

import httpx
import pytest

from chainfed_ray.api.sdk.problems import error_of
from chainfed_ray.errors import ModelNotFound


@pytest.mark.parametrize("model", ["minilm:gone@latest", "it's:gone@latest"])
def test_a_model_behind_an_alias_is_named_whatever_its_quotes(model: str) -> None:
    meant = ModelNotFound(model, ("minilm",), "support")
    answer = httpx.Response(404, json={"type": "urn:chainfed:problem:model-not-found", "detail": str(meant)})
    error = error_of("http://127.0.0.1:1", answer, "support")
    assert isinstance(error, ModelNotFound)
    assert (error.model, error.alias) == (model, "support")
