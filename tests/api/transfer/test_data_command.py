"""Promises of ``chainfed data``: a file is sent, listed and deleted, by its id."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from tests.apps import an_app, served
from tests.project import COMMAND


@pytest.fixture
def address(storage: Storage, store: JobStore) -> Iterator[str]:
    uploads = UploadStore(storage)
    with served(an_app(store, uploads=uploads)) as made:
        yield made
    uploads.close()


def chainfed(address: str, *arguments: str) -> tuple[int, str]:
    """The exit code of ``chainfed data``, and what it prints."""
    environment = {**os.environ, "CHAINFED_ADDRESS": address}
    command = [*COMMAND, "data", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_file_from_its_sending_to_its_end(address: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\na,sea\n")
    assert "There are no uploads yet" in chainfed(address, "list")[1]
    code, said = chainfed(address, "add", str(file), "--json")
    upload = json.loads(said)
    assert (code, upload["name"], upload["complete"]) == (0, "rows.csv", True)
    assert f'"upload:{upload["id"]}"' in chainfed(address, "add", str(file))[1]
    assert json.loads(chainfed(address, "list", "--json")[1]) == {"uploads": [upload]}
    assert upload["id"] in chainfed(address, "list")[1]
    assert json.loads(chainfed(address, "delete", upload["id"], "--json")[1])["status"] == "deleted"
    code, said = chainfed(address, "delete", upload["id"], "--json")
    assert (code, json.loads(said)["error"]["type"]) == (1, "UploadNotFound")
    assert chainfed(address, "add", str(tmp_path / "none.csv"))[0] == 1
