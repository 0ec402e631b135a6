"""Promise: ``chainfed database`` tells and changes the version of the tables, and asks before anything is deleted."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.schema import VERSIONS
from chainfed_ray.cluster.storage import Settings
from tests.builders import SPEC
from tests.project import COMMAND


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("CHAINFED_STORAGE", str(tmp_path / "storage"))
    return dict(os.environ)


def chainfed(environment: dict[str, str], *arguments: str, typed: str = "") -> tuple[int, str, str]:
    """The exit code of ``chainfed database``, and what it prints."""
    done = subprocess.run(
        [*COMMAND, "database", *arguments], capture_output=True, text=True, env=environment, timeout=60, input=typed
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_back_and_forward(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    database = Settings.from_environment().storage.database
    store = JobStore(database)
    job = store.submit(SPEC).id
    store.close()
    code, told, _ = chainfed(environment, "version", "--json")
    assert (code, json.loads(told)) == (0, {"database": VERSIONS[-1], "code": VERSIONS[-1]})

    code, told, _ = chainfed(environment, "migrate", "0001", typed="n\n")
    assert (code, "This deletes" in told) == (1, True)
    assert json.loads(chainfed(environment, "version", "--json")[1])["database"] == VERSIONS[-1]
    code, told, _ = chainfed(environment, "migrate", "0001", "--yes", "--json")
    assert (code, json.loads(told)) == (0, {"before": VERSIONS[-1], "database": "0001"})
    assert "version 0001" in chainfed(environment, "version")[1]

    assert chainfed(environment, "migrate")[0] == 0
    store = JobStore(database, existing=True)
    assert [found.id for found in store.page()] == [job]
    store.close()


@pytest.mark.slow
def test_a_mistake_is_told_in_words(environment: dict[str, str]) -> None:
    code, _, said = chainfed(environment, "migrate", "3")
    assert (code, "TO is '3'; expected one of 0001, 0002, 0003, 0004, 0005" in said) == (1, True), said
    code, _, said = chainfed(environment, "version")
    assert code == 1, said
