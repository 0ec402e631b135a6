"""Runs the command in Python's UTF-8 mode, whatever the locale says: names of files and jobs are in UTF-8 everywhere else."""

import os
import sys

from chainfed_ray.errors import InvalidJob

_MODE, _TERMINAL = "PYTHONUTF8", "_TERMINAL_ENCODING"


def in_utf8_mode() -> str | None:
    """Begin this process anew in UTF-8 mode, unless its names of files are in UTF-8 already. Those below it are then as well.

    With another encoding a path outside of ASCII is a text that neither a job nor a database can hold. The process that was
    begun anew is told which encoding the terminal has; None if that is what Python thinks.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get(_MODE) != "1" and sys.executable:
        os.environ |= {_MODE: "1", _TERMINAL: sys.stdout.encoding if sys.stdout else "utf-8"}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return os.environ.pop(_TERMINAL, None)


def standard_input() -> str:
    """All of the standard input.

    Raises:
        InvalidJob: it is not text in UTF-8.
    """
    given = sys.stdin.buffer.read()
    try:
        return given.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"text in UTF-8 ({error.reason} at byte {error.start})"
        raise InvalidJob.at("(standard input)", given[:40], where) from None
