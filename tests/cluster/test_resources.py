"""What actors ask of Ray."""

import shlex
import sys

import pytest

from chainfed_ray.cluster.resources import runtime_env


def test_the_path_of_python_is_quoted_for_the_shell_where_it_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/env/bin/python")
    assert runtime_env({"A": "1"}) == {"env_vars": {"A": "1"}}
    monkeypatch.setattr(sys, "executable", "/home/me/my project/bin/python")
    assert shlex.split(runtime_env({})["py_executable"]) == ["/home/me/my project/bin/python"]
