"""Promise: a process that our program prepares starts as one that Ray's program prepares."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from chainfed_ray.device import setup_worker

RAYS_OWN = Path(ray.__file__).parent / "_private" / "workers" / "setup_worker.py"
PROGRAM = "import json, os, sys; print(json.dumps([sys.argv[1:], sys.flags.utf8_mode, dict(os.environ)]))"
VARIABLES = {"PLAIN": "word", "QUOTED": """a "b" 'c' $(echo d)""", "OTHERS": "${KNOWN} $KNOWN ${NOBODYS} $NOBODYS"}


def started(program: Path, folder: Path, context: dict[str, Any] | None) -> Any:
    """The arguments, a flag and the variables of a process that ``program`` prepares."""
    asked = folder / "asked of us.py"
    asked.write_text(PROGRAM)
    given = [str(asked), "--name=one two", "--language=PYTHON"]
    given += [] if context is None else [f"--serialized-runtime-env-context={json.dumps(context)}"]
    command = [sys.executable, str(program), *given, "last"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "KNOWN": "by all"}, timeout=60)
    assert done.returncode == 0, done.stderr
    arguments, flag, variables = json.loads(done.stdout)
    for name in ("_", "SHLVL", "PWD", "OLDPWD"):  # a shell of Ray's leaves them
        variables.pop(name, None)
    return arguments, flag, variables


@pytest.mark.slow
@pytest.mark.parametrize(
    "context",
    [
        None,
        {"command_prefix": [], "env_vars": VARIABLES, "py_executable": f"'{sys.executable}' -X utf8"},
        {"command_prefix": ["export", "MADE=here", "&&"], "env_vars": {}, "py_executable": None},
    ],
    ids=["nothing of its own", "variables and an executable", "what is left to Ray"],
)
def test_it_is_the_process_that_ray_would_start(context: dict[str, Any] | None, tmp_path: Path) -> None:
    found = started(Path(setup_worker.__file__), tmp_path, context)
    assert found == started(RAYS_OWN, tmp_path, context)
    assert found[0] == ["--name=one two", "last"]
