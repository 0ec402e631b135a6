"""A service that drains, before it ends: running jobs stop after a commit, streams end, and nothing begins any more.

A file in the folder of the service says so to all its processes. Jobs stay as they are in the database, and resume when the
service starts again.
"""

from pathlib import Path


class Drain:
    """Whether the service with the folder ``root`` drains."""

    def __init__(self, root: Path) -> None:
        self._mark = root / "draining"

    def begin(self) -> None:
        """Let the service drain."""
        self._mark.touch()

    def end(self) -> None:
        """Let it work: it starts."""
        self._mark.unlink(missing_ok=True)

    def has_begun(self) -> bool:
        """Whether it drains now. It costs the look at a file's name."""
        return self._mark.exists()
