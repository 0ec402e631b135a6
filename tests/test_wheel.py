"""What an installation has: one name, every part, and a command that works beside packages of the same names."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import pytest
import yaml

from chainfed_ray.records.commit_log import CommitLog
from tests.project import FOLDERS, ROOT, files_of


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy: building leaves files in the folder."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(made), str(source))
    return next(made.glob("*.whl"))


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in an environment with the wheel alone, under a path with a space; packages of others are ours."""
    environment = tmp_path_factory.mktemp("an environment")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    _pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    return environment / "bin" / "chainfed"


@pytest.fixture
def folder(tmp_path: Path, document: dict[str, Any]) -> Path:
    """A project with packages of the names of our folders, of libraries and of Python's own modules; and a job."""
    project = tmp_path / "a project"
    for name in ("api", "cluster", "tests", "torch", "ray", "starlette", "types", "random", "token"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text(f"raise ImportError('this {name} is the user\\'s own')\n")
    document["rounds"] |= {"total": 1, "clients": 2}
    (project / "job.yaml").write_text(yaml.safe_dump(document))
    return project


@pytest.mark.slow
def test_the_wheel_has_every_file_under_one_name(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    expected = {str(path.relative_to(ROOT)) for path in files_of("chainfed_ray")}
    for part in ("api", "cluster"):
        expected |= {f"chainfed_ray/{path.relative_to(ROOT)}" for path in files_of(part)}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_a_job_runs_beside_packages_of_the_same_names_its_workers_included(command: Path, folder: Path) -> None:
    assert _run(command, folder, "--version").stdout == f"chainfed-ray {version('chainfed-ray')}\n"
    assert "Commands" in _run(command, folder, "--help").stdout
    with TemporaryDirectory() as temporary:  # tmp_path is longer than the sockets of Ray allow
        done = _run(command, folder, "run", "job.yaml", "--out", "out", "--json", TMPDIR=temporary)
        assert not list(Path(temporary).iterdir()), "nothing is left behind"
    assert json.loads(done.stdout)["status"] == "succeeded"
    (record,) = CommitLog(folder / "out" / "tiny").rounds()
    assert (len(record.turns), record.failed_turns) == (2, ()), record


def _run(command: Path, folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"CHAINFED_CLIENT_SLOTS": "1"} | settings
    done = subprocess.run(
        [str(command), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
