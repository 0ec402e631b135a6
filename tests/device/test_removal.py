"""Promise: a temporary folder is gone when its process is, however that ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.watching import wait_for

_HOLD = """
import sys
from chainfed_ray.device.removal import temporary_folder

with temporary_folder("ours-", sys.argv[1]) as folder:
    (folder / "rows").write_text("rows")
    print("made", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("kill", [True, False])
def test_the_folder_goes_with_its_process(kill: bool, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "made\n"
        made = list(tmp_path.iterdir())
        assert len(made) == 1
        if kill:
            holder.kill()
    wait_for(lambda: not list(tmp_path.iterdir()), "end of the folder", 10)
    for late in made:  # a process that has not noticed yet
        late.mkdir()
    wait_for(lambda: not list(tmp_path.iterdir()), "end of what was written later", 10)
