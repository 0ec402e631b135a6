"""Promises of ``chainfed artifacts``: it lists, and writes a file or a folder."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from tests.apps import an_app, served
from tests.builders import SPEC
from tests.project import COMMAND


@pytest.fixture
def address(storage: Storage, store: JobStore) -> Iterator[str]:
    with served(an_app(store, folder_of=storage.job)) as made:
        yield made


def chainfed(address: str, folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit code of ``chainfed artifacts`` in a folder, and what it prints."""
    environment = {**os.environ, "CHAINFED_ADDRESS": address}
    command = [*COMMAND, "artifacts", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_list_a_file_and_a_folder(address: str, storage: Storage, store: JobStore, tmp_path: Path) -> None:
    job = store.submit(SPEC).id
    store.move(job, "cancelled")
    assert "has left nothing yet" in chainfed(address, tmp_path, job)[1]
    for name in ("partition.json", "last/README.md", "last/adapter_config.json"):
        (storage.job(job) / name).parent.mkdir(parents=True, exist_ok=True)
        (storage.job(job) / name).write_text(name)
    assert "last/README.md" in chainfed(address, tmp_path, job)[1]
    assert chainfed(address, tmp_path, job, "partition.json")[0] == 0
    assert (tmp_path / "partition.json").read_text() == "partition.json"
    code, said = chainfed(address, tmp_path, job, "last", "--output", "mine", "--json")
    assert (code, json.loads(said)["output"]) == (0, "mine")
    assert {path.name: path.read_text() for path in (tmp_path / "mine").iterdir()} == {
        "README.md": "last/README.md", "adapter_config.json": "last/adapter_config.json",
    }  # fmt: skip
    code, said = chainfed(address, tmp_path, job, "none", "--json")
    assert (code, json.loads(said)["error"]["type"]) == (1, "ArtifactNotFound")
