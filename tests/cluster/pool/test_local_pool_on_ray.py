"""Promise: rules of a caller's own run on a Ray cluster of his process, also those in a module beside his program."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_RULES = """
def steeper(stack, window, states, mask, loss):
    return 2 * loss(states, True)
"""
_PROGRAM = """
import json
import sys
from pathlib import Path

from rules import steeper

from chainfed_ray.cluster.pool.local import on_local_ray
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.federation.run import run_job
from chainfed_ray.records.rounds import Round
from chainfed_ray.spec.parse import parse_job

with on_local_ray(Settings(Storage.at(Path("storage")), client_slots=1)) as pool:
    for record in run_job(parse_job(json.loads(sys.argv[1])), Path("job"), pool=pool, objective=steeper):
        if isinstance(record, Round):
            print(json.dumps([len(record.turns), [turn.reason for turn in record.failed_turns]]))
"""


@pytest.mark.slow
def test_an_objective_in_a_module_beside_the_program_is_found_by_clients(
    document: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "rules.py").write_text(_RULES)
    (tmp_path / "program.py").write_text(_PROGRAM)
    document["rounds"] |= {"total": 1, "clients": 2, "quorum": 2}
    done = subprocess.run(
        [sys.executable, "program.py", json.dumps(document)], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [2, []]
