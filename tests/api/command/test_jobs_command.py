"""Promises of the commands that tell a job what to do."""

from typing import Any

import pytest

from chainfed_ray.api.command.jobs_command import patch_of
from chainfed_ray.errors import InvalidSetting


@pytest.mark.parametrize(
    ("changes", "patch"),
    [
        ([], {}),
        (["seed=5"], {"seed": 5}),
        (
            ["name=other", "rounds.total=40", "rounds.clients=2"],
            {"name": "other", "rounds": {"total": 40, "clients": 2}},
        ),
        (["rounds.learning_rate=null"], {"rounds": {"learning_rate": None}}),
        (["fleet.clients=[{name: a, memory: 64MiB}]"], {"fleet": {"clients": [{"name": "a", "memory": "64MiB"}]}}),
        (["data.text=a=b"], {"data": {"text": "a=b"}}),
    ],
)
def test_changes_are_a_patch(changes: list[str], patch: dict[str, Any]) -> None:
    assert patch_of(changes) == patch


@pytest.mark.parametrize("change", ["seed", "=5", "rounds.=5", ".seed=5", "seed={", "seed=[1"])
def test_what_is_no_change_is_refused(change: str) -> None:
    with pytest.raises(InvalidSetting, match="a key and a value in YAML"):
        patch_of([change])


def test_a_key_below_a_value_is_refused() -> None:
    with pytest.raises(InvalidSetting):
        patch_of(["seed=5", "seed.inner=6"])
