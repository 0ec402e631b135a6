"""Promise: a folder is free when every process that uses it has ended, however it ended."""

import subprocess
import sys
from pathlib import Path

from chainfed_ray.cluster.occupancy import is_free, occupy

_HOLD = "import sys; from pathlib import Path; from chainfed_ray.cluster.occupancy import occupy; "
_HOLD += "lock = occupy(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"


def test_a_folder_is_free_when_all_who_hold_it_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    (tmp_path / "file").touch()
    assert is_free(tmp_path / "file"), "it is no folder"
    assert is_free(folder), "nobody has made it"
    with occupy(folder):
        command = [sys.executable, "-c", _HOLD, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdout.readline()
            assert not is_free(folder)
            other.kill()
        assert not is_free(folder), "one of two"
    assert is_free(folder)
