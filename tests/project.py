"""Where the project is, and how its command is run from it."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "from chainfed_ray.api.cli import main; main()"]
