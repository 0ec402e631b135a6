"""The doctor says what a machine lacks and how to get it; what was compiled needs no compiler."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from chainfed_ray.cluster.offload.build import are_built, build_ops, ops_folder
from chainfed_ray.cluster.offload.doctor import Machine, findings, is_possible, look, why_not
from chainfed_ray.cluster.offload.libraries import OPS, library
from chainfed_ray.errors import InvalidSetting, OpsNotBuilt
from tests.clusters import needs_ops
from tests.models import tiny
from tests.project import COMMAND
from tests.watching import wait_for

ABLE = Machine(
    compiler="/usr/bin/c++",
    ninja="/usr/bin/ninja",
    header="/usr/include/libaio.h",
    library=True,
    ops=Path("/ops"),
    built=True,
    lockable=None,
    scratch=Path("/scratch"),
    direct=True,
    free_disk=2**40,
)


def missing(machine: Machine) -> dict[str, str | None]:
    """What is needed and not there, with its remedy."""
    return {item.name: item.remedy for item in findings(machine) if item.needed and not item.ok}


def test_a_machine_that_has_all_lacks_nothing() -> None:
    assert missing(ABLE) == {}
    assert is_possible(findings(ABLE))
    assert why_not(ABLE, lock=2**30, disk=2**35) is None


def test_what_was_compiled_needs_no_compiler() -> None:
    bare = replace(ABLE, compiler=None, ninja=None, header=None)
    assert is_possible(findings(bare))
    assert why_not(bare, 1, 1) is None
    assert missing(replace(bare, built=False)) == {
        "compiled libraries": "chainfed doctor --build",
        "C++ compiler": "apt-get install -y g++",
        "ninja": "pip install ninja",
        "libaio's header": "apt-get install -y libaio-dev",
    }


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (replace(ABLE, library=False), "libaio: it cannot be loaded; apt-get install -y libaio1"),
        (replace(ABLE, built=False), "compiled libraries: they are not in /ops; chainfed doctor --build"),
        (replace(ABLE, lockable=2**16), "locked memory: 64KiB of the 32MiB needed; ulimit -l unlimited"),
        (replace(ABLE, free_disk=2**30), "disk: 1GiB free in /scratch, 2GiB needed; set CHAINFED_SCRATCH"),
        (replace(ABLE, direct=False), "direct file access: not possible in /scratch; set CHAINFED_SCRATCH"),
    ],
)
def test_the_reason_is_one_sentence_with_what_would_do(machine: Machine, words: str) -> None:
    reason = why_not(machine, lock=2**25, disk=2**31)
    assert reason is not None
    assert reason.startswith(words)
    assert "\n" not in reason


def test_memory_that_may_be_locked_is_enough_for_a_small_model_and_not_for_a_large_one() -> None:
    machine = replace(ABLE, lockable=8 * 2**20)
    assert why_not(machine, lock=2**23, disk=0) is None
    assert why_not(machine, lock=2**23 + 1, disk=0) is not None


def test_a_machine_without_compiler_and_libaio(tmp_path: Path) -> None:
    """Its PATH, its headers and the name of the library are ours to give."""
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    machine = look(tmp_path, environment, include=(tmp_path,), library="libno-such-thing.so.1")
    assert (machine.compiler, machine.header, machine.library, machine.built) == (None, None, False, False)
    assert {"libaio", "compiled libraries", "C++ compiler", "libaio's header"} <= missing(machine).keys()
    (tmp_path / "libaio.h").touch()
    compiler = tmp_path / "c++"
    compiler.touch(mode=0o755)
    machine = look(tmp_path, environment, include=(tmp_path,), library="libc.so.6")
    assert (machine.compiler, machine.header) == (str(compiler), str(tmp_path / "libaio.h"))
    assert machine.library


def test_a_scratch_folder_that_is_not_there_yet_is_looked_at_where_it_would_be(tmp_path: Path) -> None:
    machine = look(tmp_path / "some" / "where")
    assert machine.free_disk == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert not (tmp_path / "some").exists()


def test_a_folder_in_memory_is_no_disk() -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("this machine has no folder in memory")
    assert not look(memory / "scratch").direct


def test_each_version_has_its_folder(tmp_path: Path) -> None:
    named = ops_folder({"CHAINFED_EXTENSIONS": str(tmp_path)})
    assert named.parent == tmp_path
    assert "torch" in named.name
    assert "deepspeed" in named.name
    assert ops_folder({"HOME": "/home/someone"}).parent == Path("/home/someone/.cache/chainfed")
    with pytest.raises(InvalidSetting, match="CHAINFED_EXTENSIONS is 'here'; expected an absolute path"):
        ops_folder({"CHAINFED_EXTENSIONS": "here"})


def test_a_folder_that_cannot_be_made_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OpsNotBuilt, match=r"Not a directory.*; CHAINFED_EXTENSIONS may name a folder"):
        build_ops(tmp_path / "file" / "ops")


def test_what_is_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    """Nothing is written either: an image's folder belongs to another user."""
    for name in OPS:
        library(name, tmp_path).touch()
    before = set(tmp_path.iterdir())
    build_ops(tmp_path)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_compilation_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OpsNotBuilt, match=r"no-such-compiler.*; `chainfed doctor` says what is missing"):
        build_ops(tmp_path)
    assert not are_built(tmp_path)


_BUILDING = """
import sys
from pathlib import Path

from chainfed_ray.cluster.offload.build import build_ops

build_ops(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_compilation_that_was_killed_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds up nobody, and what it left behind goes with the next one."""
    tools, ops = tmp_path / "bin", tmp_path / "ops"
    tools.mkdir()
    compiler = tools / "c++"
    compiler.write_text("#!/bin/sh\nexec tail -f /dev/null\n")  # one that never ends
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler)}
    building = subprocess.Popen([sys.executable, "-c", _BUILDING, str(ops)], env=environment, start_new_session=True)
    try:
        # DeepSpeed's own, for which another DeepSpeed would wait.
        wait_for(lambda: any(ops.glob("*/*/lock")), "lock")
    finally:
        os.killpg(building.pid, signal.SIGKILL)
        building.wait()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OpsNotBuilt, match="no-such-compiler"):
        build_ops(ops)
    assert [path.name for path in ops.iterdir()] == ["lock"]


@pytest.mark.slow
def test_the_command_fits_80_columns_and_its_exit_code_says_whether(tmp_path: Path) -> None:
    environment = {**os.environ, "CHAINFED_EXTENSIONS": str(tmp_path), "COLUMNS": "80"}
    words = subprocess.run([*COMMAND, "doctor"], env=environment, capture_output=True, text=True)
    assert words.returncode == 1
    assert "compiled libraries: chainfed doctor --build" in words.stdout
    assert all(len(line) <= 80 for line in words.stdout.splitlines()), words.stdout
    done = subprocess.run([*COMMAND, "doctor", "--json"], env=environment, capture_output=True, text=True)
    document = json.loads(done.stdout)
    assert (done.returncode, document["deepspeed"], document["torch"]) == (1, False, True)
    assert {item["name"] for item in document["findings"]} == {item.name for item in findings(ABLE)}


_LOADING = """
import sys, torch
from pathlib import Path
from chainfed_ray.model.source import ModelSource
from chainfed_ray.cluster.offload.model import OffloadedModel
from chainfed_ray.cluster.offload.build import ops_folder
base = ModelSource(Path(sys.argv[1]), torch.float32, Path(sys.argv[2]))
OffloadedModel(base, base.scratch / "nvme", ops_folder(), lambda: None).close()
"""


@needs_ops
@pytest.mark.slow
def test_a_model_is_loaded_without_compiler_and_ninja(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "cat", "rm"):
        (tools / name).symlink_to(shutil.which(name) or "")
    arguments = [str(tiny("bert", tmp_path / "model")), str(tmp_path)]
    environment = {**os.environ, "PATH": str(tools), "CHAINFED_EXTENSIONS": str(ops_folder().parent)}
    done = subprocess.run([sys.executable, "-c", _LOADING, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "nvme").exists()
