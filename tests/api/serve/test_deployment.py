"""The Serve application has as many processes that answer with models as the settings say."""

import asyncio
from collections import Counter
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


_FAILED, _SCALED = DeploymentStatusTrigger.REPLICA_STARTUP_FAILED, DeploymentStatusTrigger.AUTOSCALING
_UNPLACED = (
    "Deployment 'Inference' in application 'app' has 1 replicas that have taken more than 30s to be scheduled. …"
)


@pytest.mark.parametrize(
    ("trigger", "others", "message", "expected"),
    [
        (_SCALED, [], "", None),
        (_SCALED, [], _UNPLACED, "waits for a machine with as much free memory"),
        (_SCALED, [ReplicaState.RUNNING], _UNPLACED, None),
        (_SCALED, [ReplicaState.STOPPING], _UNPLACED, None),
        (_FAILED, [], "", "cannot start"),
        (_FAILED, [ReplicaState.RUNNING], "", None),
    ],
)
def test_a_process_that_cannot_start_is_noticed_where_none_need_be_there(
    trigger: DeploymentStatusTrigger,
    others: list[ReplicaState],
    message: str,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Ray Serve gives the states' names as strings, which its types do not say.
    states: Any = Counter(state.value for state in (ReplicaState.STARTING, *others))
    of_models = DeploymentStatusOverview(DeploymentStatus.UPDATING, trigger, states, message)
    status = SimpleNamespace(applications={"app": SimpleNamespace(deployments={"Inference": of_models})})
    monkeypatch.setattr(serve, "status", lambda: status)
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="app"))
    with pytest.raises(PartUnavailable, match=expected) if expected else nullcontext():
        asyncio.run(deployment.check_start())
