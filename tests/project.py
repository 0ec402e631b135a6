"""Where the project is, what is in its folders, and how its command is run from it."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "from chainfed_ray.api.command.entry import main; main()"]
FOLDERS = ("chainfed_ray", "cluster", "api")


def files_of(folder: str) -> list[Path]:
    """The Python files of a folder. Files behind the links in ``chainfed_ray`` belong to the folders that they link to."""
    return [path for path in (ROOT / folder).rglob("*.py") if path.resolve().relative_to(ROOT).parts[0] == folder]
