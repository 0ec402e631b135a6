"""Measures one cell of a memory benchmark in its own process, so that no earlier cell's memory counts."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from chainfed_ray.device.peak import ENVIRONMENT

Row = dict[str, Any]


def in_a_process(module: str, cell: Mapping[str, Any]) -> Row:
    """Run ``python -m MODULE CELL-AS-JSON``, and give the JSON object that it prints last.

    If the process fails, the object has one key, ``failed``, with the last line of stderr.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(cell)],
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found
