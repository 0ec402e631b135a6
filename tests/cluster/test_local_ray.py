"""Promise: where Ray cannot start, the words name the setting and what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_START = """
import sys
from pathlib import Path

from chainfed_ray.cluster.local_ray import local_ray
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.errors import InvalidSetting

try:
    with local_ray(Settings(Storage.at(Path(sys.argv[1]))), {}):
        pass
except InvalidSetting as error:
    print(error)
"""


@pytest.mark.slow
def test_a_temporary_folder_that_is_too_long_for_sockets_is_named(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _START, str(tmp_path / "storage")],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stdout.startswith(f"TMPDIR is '{folder}'; expected a shorter path: ")
