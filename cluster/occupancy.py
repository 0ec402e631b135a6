"""Tells whether processes still use a folder: each holds a lock in it, which the kernel frees when the process has ended.

Ray says that an actor is dead as soon as it has asked for that. Its process may go on for a while, and write what we removed.
"""

import fcntl
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_LOCK = "in-use"


def occupy(folder: Path) -> BinaryIO:
    """Make ``folder``, and hold it, with any number of others, until the file returned is closed or this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / _LOCK).open("ab")
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def is_abandoned(folder: Path) -> bool:
    """Whether a process has held ``folder``, and none does now. False where nobody can know: a file system without locks."""
    return _is_held(folder) is False


def is_free(folder: Path) -> bool:
    """Whether no process of this machine holds ``folder``; of other machines neither, where they share its file system."""
    return _is_held(folder) is not True


def _is_held(folder: Path) -> bool | None:
    """None where nobody has held ``folder``, or its file system has no locks."""
    try:
        with (folder / _LOCK).open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
