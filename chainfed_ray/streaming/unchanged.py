"""What this process has found out about a model's files: it holds as long as they stay as they are."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

Found = TypeVar("Found")


class Answers:
    """Remembers at most so many answers. The one that was asked for longest ago goes first."""

    def __init__(self, most: int) -> None:
        self._most, self._known, self._one_thread = most, OrderedDict[Hashable, Any](), Lock()

    def while_unchanged(self, folder: Path, question: Hashable, answer: Callable[[], Found]) -> Found:
        """The ``answer`` to a ``question`` about the files in ``folder``: that of an earlier call, if no file has changed.

        An error is no answer: it is raised, and the next call asks again.
        """
        asked = (folder, _files(folder), question)
        with self._one_thread:
            if asked in self._known:
                self._known.move_to_end(asked)
                found: Found = self._known[asked]
                return found
        found = answer()
        with self._one_thread:
            self._known[asked] = found
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return found


while_unchanged = Answers(most=64).while_unchanged


def _files(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What tells whether a file was changed, or another was put in its place: the name, inode, size and time of each."""
    stats = sorted((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
