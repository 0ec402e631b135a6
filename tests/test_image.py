"""The image is built as `make image` builds it; in it the doctor finds DeepSpeed's libraries, and a job ends with a model.

It takes some ten minutes and gigabytes, so it runs only where buildah is and an image to build upon is named.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders import a_document
from tests.project import ROOT

BASE = os.environ.get("CHAINFED_TEST_BASE")
OPTIONS = os.environ.get("CHAINFED_TEST_BUILD", "")  # more of them for the build, such as --network host
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not BASE or not shutil.which("buildah"),
        reason="needs buildah, and an image to build upon: CHAINFED_TEST_BASE=python:3.11-slim-bookworm",
    ),
]


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    """A container of the image, to run commands in."""
    image = "localhost/chainfed-ray:test"
    options = f"--build-arg BASE={BASE} {OPTIONS}"
    subprocess.run(["make", "image", "ENGINE=buildah", f"IMAGE={image}", f"BUILD={options}"], cwd=ROOT, check=True)
    name = subprocess.run(["buildah", "from", image], capture_output=True, text=True, check=True).stdout.strip()
    yield name
    subprocess.run(["buildah", "rm", name], check=True)


def said_in(container: str, *command: str) -> Any:
    """What ``command`` prints there as its last line, which is JSON."""
    done = subprocess.run(["buildah", "run", container, "--", *command], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_has_the_libraries_and_none_of_cuda(container: str) -> None:
    found = {item["name"]: item["ok"] for item in said_in(container, "chainfed", "doctor", "--json")["findings"]}
    assert found["libaio"]
    assert found["compiled libraries"]
    assert not found["C++ compiler"]
    assert said_in(container, "python3", "-c", "import torch; print(int(torch.backends.cuda.is_built()))") == 0


def test_a_job_runs_in_it(container: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    shutil.copy(tiny_data, tmp_path / "rows.jsonl")
    document = a_document(Path("job/model"), Path("job/rows.jsonl"))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
    copied = ["buildah", "copy", "--chown", "chainfed:chainfed", container, str(tmp_path), "/home/chainfed/job"]
    subprocess.run(copied, check=True)
    result = said_in(container, "chainfed", "run", "job/job.yaml", "--out", "/tmp/out", "--json")
    assert result["status"] == "succeeded"
