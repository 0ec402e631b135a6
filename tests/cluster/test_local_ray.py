"""Promise: where Ray cannot start, the words name the setting and what to do."""

import os
import subprocess
import sys
from pathlib import Path
from time import time

import pytest

from chainfed_ray.device.removal import temporary_folder

_START = """
import sys
from pathlib import Path

from chainfed_ray.cluster.local_ray import local_ray
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.errors import ChainFedError

try:
    with local_ray(Settings(Storage.at(Path(sys.argv[1]))), {}):
        pass
except ChainFedError as error:
    print(error)
"""


# A Ray that comes up at the third try, if at all.
_LATE = """
import sys

tries = 0


def init(**options):
    global tries
    tries += 1
    print("try", tries, file=sys.stderr)
    if tries < {needed}:
        raise Exception("The current node timed out during startup.\\nMore of it")


def shutdown():
    print("cleared", file=sys.stderr)


class job_config:
    class JobConfig:
        pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(("needed", "expected"), [
    (3, ["try 1", "cleared", "try 2", "cleared", "try 3", "cleared"]),
    (4, ["try 1", "cleared", "try 2", "cleared", "try 3", "cleared", (
        "Ray did not start on this machine: The current node timed out during startup. "
        "(3 tries, and the machine may be too busy for it, or out of memory)")]),
])  # fmt: skip
def test_on_a_busy_machine_it_is_tried_again_and_what_had_started_is_cleared(
    needed: int, expected: list[str], tmp_path: Path
) -> None:
    private = tmp_path / "ray" / "_private"
    private.mkdir(parents=True)
    (private / "parameter.py").write_text("class RayParams: pass")
    (tmp_path / "ray" / "__init__.py").write_text(_LATE.format(needed=needed))
    script = _START.replace("import sys", f"import sys\nsys.path.insert(0, {str(tmp_path)!r})", 1)
    place = tmp_path / "temporary"
    for name in ("cf-00aa/session_1", "cf-00bb/mine"):
        (place / name).mkdir(parents=True)
        os.utime((place / name).parent, (0, 0))
    for number in range(5):  # of today, the first the oldest
        failed = place / f"cf-00c{number}"
        failed.mkdir()
        (failed / "in-use").touch()
        os.utime(failed, (time() - 1000 + number,) * 2)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "storage")],
        env={**os.environ, "TMPDIR": str(place)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    told = done.stderr.splitlines()
    assert told + done.stdout.splitlines() == expected
    left = {path.name for path in place.iterdir()}
    assert "cf-00aa" not in left, "what a Ray left behind long ago"
    assert "cf-00bb" in left, "what is another's"
    assert left >= {"cf-00c2", "cf-00c3", "cf-00c4"}, "the logs of the last failures are kept"
    assert not left & {"cf-00c0", "cf-00c1"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [
    ("long" * 20, "a shorter path: "),
    ("für", "a path of ASCII characters: "),
])  # fmt: skip
def test_a_temporary_folder_that_ray_cannot_use_is_named(name: str, expected: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _START, str(tmp_path / "storage")],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stdout.startswith(f"TMPDIR is '{folder}'; expected {expected}")


@pytest.mark.slow
def test_nobody_else_on_this_machine_gets_to_rays_sockets_and_logs(tmp_path: Path) -> None:
    """Ray opens its own folder to everybody."""
    script = _START.replace(
        "        pass\n",
        "        print(*(oct(path.stat().st_mode) for path in Path(sys.argv[2]).iterdir()), file=sys.__stdout__)\n",
    )
    with temporary_folder("t-", "/tmp") as short:
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "storage"), str(short)],
            env={**os.environ, "TMPDIR": str(short)},
            stdout=subprocess.PIPE,
            text=True,
            timeout=100,
            check=True,
        )
        assert not list(short.iterdir())
    assert done.stdout.split() == ["0o40700"]
