"""Promises of the commands that list jobs and tell them what to do."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from chainfed_ray.api.command.cli import app
from chainfed_ray.api.command.jobs_command import patch_of
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.errors import InvalidJob, InvalidSetting, JobConflict, JobNotFound
from chainfed_ray.spec.parse import parse_job
from tests.apps import an_app, served
from tests.builders import SPEC


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


Chainfed = Callable[..., dict[str, Any]]


@pytest.fixture
def chainfed(store: JobStore, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Chainfed]:
    """Runs a command on a service, and gives the JSON that it prints; raises what the command raises."""
    with served(an_app(store)) as address:
        monkeypatch.setenv("CHAINFED_ADDRESS", address)

        def run(*arguments: str, answers: str | None = None) -> dict[str, Any]:
            done = CliRunner().invoke(app, [*arguments, "--json"], input=answers)
            if done.exception and not isinstance(done.exception, SystemExit):
                raise done.exception
            printed = capfd.readouterr().out
            found: dict[str, Any] = json.loads(printed) if done.exit_code == 0 else {"exit_code": done.exit_code}
            return found

        yield run


@pytest.mark.slow
def test_a_job_from_pause_to_deletion(chainfed: Chainfed, store: JobStore) -> None:
    job = store.submit(SPEC).id
    assert chainfed("pause", job)["status"] == "paused"
    assert chainfed("resume", job)["status"] == "queued"
    assert chainfed("cancel", job)["status"] == "cancelled"
    with pytest.raises(JobConflict, match=f"job {job} is cancelled; it cannot be paused"):
        chainfed("pause", job)
    assert chainfed("retry", job)["status"] == "queued"
    with pytest.raises(JobConflict, match="is queued; it cannot be deleted"):
        chainfed("delete", job, "--yes")
    chainfed("cancel", job)
    assert chainfed("delete", job, answers="n\n") == {"exit_code": 1}
    assert store.get(job).status == "cancelled"
    assert chainfed("delete", job, "--yes") == {"id": job, "status": "deleted"}
    with pytest.raises(JobNotFound):
        chainfed("retry", job)


@pytest.mark.slow
def test_a_clone_has_the_changes(chainfed: Chainfed, store: JobStore) -> None:
    job = store.submit(SPEC).id
    made = chainfed("clone", job, "--set", "rounds.total=7", "--set", "name=other")
    assert made["spec"] == parse_job(SPEC.document() | {"name": "other", "rounds": made["spec"]["rounds"]}).document()
    assert made["spec"]["rounds"]["total"] == 7
    with pytest.raises(InvalidJob, match=r"rounds\.total is 0"):
        chainfed("clone", job, "--set", "rounds.total=0")


@pytest.mark.slow
def test_a_list_by_state_and_label(chainfed: Chainfed, store: JobStore) -> None:
    jobs = [store.submit(parse_job(SPEC.document() | {"labels": {"team": team}})).id for team in ("ads", "search")]
    store.move(jobs[0], "cancelled")
    for options, expected in (
        ((), jobs[::-1]),
        (("--label", "team=ads"), jobs[:1]),
        (("--state", "queued"), jobs[1:]),
        (("--state", "queued", "--state", "cancelled", "--limit", "1"), jobs[1:]),
    ):
        assert [job["id"] for job in chainfed("list", *options)["jobs"]] == expected
    with pytest.raises(InvalidJob, match="state"):
        chainfed("list", "--state", "odd")
