"""Ctrl-C, also where Python loses it: an interruption that is raised in a destructor or a callback is only printed."""

import signal
from types import FrameType, TracebackType
from typing import Self


class Interruption:
    """For as long as the block runs, Ctrl-C raises ``KeyboardInterrupt``, and so does every ``check`` after it.

    A process that was started to ignore Ctrl-C, as a shell's background jobs are, goes on ignoring it.
    """

    def __init__(self) -> None:
        self._asked_for = False
        self._before = signal.getsignal(signal.SIGINT)

    def __enter__(self) -> Self:
        if self._before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """To be called by work that goes on.

        Raises:
            KeyboardInterrupt: it was asked to end, and has not.
        """
        if self._asked_for:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._asked_for = True
        raise KeyboardInterrupt
