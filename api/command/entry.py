"""How the command begins: in Python's UTF-8 mode, whatever the locale says, and so that Ctrl-C ends it without a traceback."""

import os
import signal
import sys

from chainfed_ray.api.command.interruption import INTERRUPTED, ending_at_once

_MODE, _TERMINAL = "PYTHONUTF8", "_TERMINAL_ENCODING"


def main() -> None:
    """Run the command, as a console starts it. Its imports take most of a second, so they come within."""
    heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # it is not ignored
    try:
        with ending_at_once():
            terminal = _in_utf8_mode()
            from chainfed_ray.api.command.cli import main as run

        run(terminal)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    finally:
        if heeds:  # Ctrl-C ends at once what Python does at its end, which would print a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _in_utf8_mode() -> str | None:
    """Begin this process anew in UTF-8 mode, unless its names of files are in UTF-8 already. Those below it are then as well.

    With another encoding a path outside of ASCII is a text that neither a job nor a database can hold. The process that was
    begun anew is told which encoding the terminal has; None if that is what Python thinks.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get(_MODE) != "1" and sys.executable:
        os.environ |= {_MODE: "1", _TERMINAL: sys.stdout.encoding if sys.stdout else "utf-8"}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return os.environ.pop(_TERMINAL, None)
