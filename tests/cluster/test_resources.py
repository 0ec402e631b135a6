"""What actors ask of Ray."""

import shlex
import sys
from typing import Any

import pytest

from chainfed_ray.cluster.resources import (
    CLIENT_SLOT,
    COORDINATOR_SLOT,
    api_options,
    client_options,
    controller_options,
    coordinator_options,
    inference_options,
    preflight_options,
    runtime_env,
)


def test_the_path_of_python_is_quoted_for_the_shell_where_it_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/env/bin/python")
    assert runtime_env({"A": "1"}) == {"env_vars": {"A": "1"}}
    monkeypatch.setattr(sys, "executable", "/home/me/my project/bin/python")
    assert shlex.split(runtime_env({})["py_executable"]) == ["/home/me/my project/bin/python"]


def test_no_actor_but_a_clients_runs_on_a_machine_for_clients() -> None:
    """It would keep the machine, after the last client has gone."""
    assert client_options(1)["resources"].keys() == {CLIENT_SLOT}
    others = (api_options(), controller_options(), coordinator_options(), inference_options(), preflight_options())
    assert [options["resources"].keys() for options in others] == [{COORDINATOR_SLOT}] * len(others)


def test_the_processes_of_the_api_do_not_either() -> None:
    from chainfed_ray.api.serve.deployment import Api

    options: dict[str, Any] = Api.ray_actor_options  # type: ignore[attr-defined]
    assert options["resources"].keys() == {COORDINATOR_SLOT}
