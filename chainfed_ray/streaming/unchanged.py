"""What this process has found out about a model's files: it holds as long as they stay as they are."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

_KEPT = 64  # answers; the one that was asked for longest ago goes first
_known: OrderedDict[Hashable, Any] = OrderedDict()
_one_thread = Lock()
Found = TypeVar("Found")


def while_unchanged(folder: Path, question: Hashable, answer: Callable[[], Found]) -> Found:
    """The ``answer`` to a ``question`` about the files in ``folder``: that of an earlier call, if no file has changed since.

    An error is no answer: it is raised, and the next call asks again.
    """
    asked = (folder, _files(folder), question)
    with _one_thread:
        if asked in _known:
            _known.move_to_end(asked)
            found: Found = _known[asked]
            return found
    found = answer()
    with _one_thread:
        _known[asked] = found
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    return found


def _files(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What tells whether a file was changed, or another was put in its place: the name, inode, size and time of each."""
    stats = sorted((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
