"""A cell of a benchmark of memory, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from chainfed_ray.device.peak import ENVIRONMENT

Row = dict[str, Any]


def in_a_process(module: str, cell: Mapping[str, Any]) -> Row:
    """The JSON object that ``python -m MODULE CELL-AS-JSON`` prints last; or, as ``failed``, why there is none."""
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(cell)],
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found
