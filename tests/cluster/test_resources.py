"""What actors ask of Ray."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.cluster.resources import (
    CLIENT_SLOT,
    COORDINATOR_SLOT,
    api_options,
    check_options,
    client_options,
    controller_options,
    coordinator_options,
    inference_options,
    preflight_options,
    runtime_env,
)
from chainfed_ray.device.peak import ENVIRONMENT


def test_the_path_of_python_is_quoted_for_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/home/me/my project/bin/python")
    python, *flags, launcher, _ = shlex.split(runtime_env()["py_executable"])
    assert python == "/home/me/my project/bin/python"
    assert flags == ["-I", "-S"], "it starts for each process, so it has to start quickly"
    assert Path(launcher).is_file()


def test_every_process_has_the_variables_of_the_one_that_it_is_forked_from() -> None:
    assert runtime_env({"A": "1"})["env_vars"] == {**ENVIRONMENT, "A": "1"}


def test_no_actor_but_a_clients_runs_on_a_machine_for_clients() -> None:
    """It would keep the machine, after the last client has gone."""
    assert client_options(1)["resources"].keys() == {CLIENT_SLOT}
    others = (
        api_options(),
        controller_options(),
        coordinator_options(),
        inference_options(),
        preflight_options(),
        check_options(),
    )
    assert [options["resources"].keys() for options in others] == [{COORDINATOR_SLOT}] * len(others)


def test_what_waits_as_long_as_the_service_runs_keeps_nothing_from_clients() -> None:
    """A job is told that a client fits if the machine's memory holds it: nobody may hold a part of that for ever."""
    for options in (api_options(), controller_options(), coordinator_options(), inference_options(), check_options()):
        assert (options["num_cpus"], "memory" in options) == (0, False)


def test_the_processes_of_the_api_do_not_either() -> None:
    from chainfed_ray.api.serve.deployment import Api

    options: dict[str, Any] = Api.ray_actor_options  # type: ignore[attr-defined]
    assert options["resources"].keys() == {COORDINATOR_SLOT}
