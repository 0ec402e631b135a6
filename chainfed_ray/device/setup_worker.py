"""Prepares a process of Ray as Ray's own ``setup_worker.py`` does, without loading Ray for it.

Ray starts each process through that program. It sets variables and becomes Python, and before it imports all of Ray: a
second of CPU time. On Linux this one does the same for a process of Python that has no more than variables and an executable
of its own. All others are left to Ray's. It is run once for each process, so it imports little, and nothing of ours.

    python setup_worker.py PROGRAM ARGUMENT… --language=PYTHON [--serialized-runtime-env-context=JSON]
"""

import json
import os
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context=", "--language="
_UNSET = re.compile(r"\$\{[A-Z0-9_]+\}")


def main() -> None:
    """Become the program that the command line names, with the variables and the executable of its runtime environment."""
    given = sys.argv[1:]
    context = json.loads(next((word.removeprefix(_CONTEXT) for word in given if word.startswith(_CONTEXT)), "{}"))
    is_plain = not context.get("command_prefix") and not context.get("override_worker_entrypoint")
    if sys.platform != "linux" or f"{_LANGUAGE}PYTHON" not in given or not is_plain:
        os.execv(sys.executable, [sys.executable, str(_rays_own()), *given])
    for name, value in (context.get("env_vars") or {}).items():
        os.environ[name] = _UNSET.sub("", os.path.expandvars(value))
    command = shlex.split(context.get("py_executable") or shlex.quote(sys.executable))
    os.execvp(command[0], [*command, *(word for word in given if not word.startswith((_CONTEXT, _LANGUAGE)))])


def _rays_own() -> Path:
    """Ray's program, found without importing Ray."""
    package = find_spec("ray")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "_private" / "workers" / "setup_worker.py"


if __name__ == "__main__":
    main()
