"""The Serve application has as many processes that answer with models as the settings say."""

import asyncio
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from ray import serve
from ray.serve._private.common import ReplicaState
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview, DeploymentStatusTrigger

from chainfed_ray.api.serve import deployment
from chainfed_ray.errors import PartUnavailable


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


_FAILED = DeploymentStatusTrigger.REPLICA_STARTUP_FAILED


@pytest.mark.parametrize(
    ("trigger", "running", "starts"),
    [(DeploymentStatusTrigger.AUTOSCALING, 0, True), (_FAILED, 0, False), (_FAILED, 1, True)],
)
def test_a_process_that_could_not_start_is_noticed_where_none_need_be_there(
    trigger: DeploymentStatusTrigger, running: int, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: Any = {ReplicaState.RUNNING: running, ReplicaState.STARTING: 1}
    of_models = DeploymentStatusOverview(DeploymentStatus.UPDATING, trigger, states, "")
    status = SimpleNamespace(applications={"app": SimpleNamespace(deployments={"Inference": of_models})})
    monkeypatch.setattr(serve, "status", lambda: status)
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="app"))
    with nullcontext() if starts else pytest.raises(PartUnavailable, match="cannot start"):
        asyncio.run(deployment.check_start())
