"""The Serve application has as many processes that answer with models as the settings say."""

from pathlib import Path
from typing import Any, Self

import pytest

from chainfed_ray.api.serve import deployment


class Given:
    """Stands for a deployment, and keeps its options."""

    def __init__(self) -> None:
        self.options_given: dict[str, Any] = {}

    def options(self, **options: Any) -> Self:
        self.options_given |= options
        return self

    def bind(self, *arguments: Any) -> Self:
        return self


@pytest.mark.parametrize(
    ("most", "least", "scaled"), [("4", "4", (4, 4)), ("4", "1", (1, 4)), ("1", "1", None), ("1", "0", (0, 1))]
)
def test_there_are_as_many_processes_with_models_as_are_asked_for(
    most: str, least: str, scaled: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inference = Given()
    monkeypatch.setattr(deployment, "Inference", inference)
    monkeypatch.setattr(deployment, "Api", Given())
    monkeypatch.setenv("CHAINFED_STORAGE", str(tmp_path))
    monkeypatch.setenv("CHAINFED_SERVING_REPLICAS", most)
    monkeypatch.setenv("CHAINFED_SERVING_LEAST_REPLICAS", least)
    deployment.build({})
    scaling = inference.options_given.get("autoscaling_config")
    assert (scaling and (scaling["min_replicas"], scaling["max_replicas"])) == scaled
