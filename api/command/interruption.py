"""Heeds Ctrl-C where Python loses it: a ``KeyboardInterrupt`` in a destructor, a callback or an import may be passed over."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

INTERRUPTED = 130  # the exit code that shells give to a command ended by Ctrl-C


@contextmanager
def ending_at_once() -> Iterator[None]:
    """In the block, which imports and does nothing else, Ctrl-C ends the process without words: there is nothing to tidy up.

    A process that was started to ignore Ctrl-C keeps ignoring it.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Interruption:
    """A context manager. In its block, Ctrl-C raises ``KeyboardInterrupt``, and every ``check`` afterwards raises it again.

    A process that was started to ignore Ctrl-C, like a shell's background job, keeps ignoring it.
    """

    def __init__(self) -> None:
        self._interrupted = False
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
        """Call this regularly from work that must stop after Ctrl-C.

        Raises:
            KeyboardInterrupt: the user has pressed Ctrl-C, but the exception was lost.
        """
        if self._interrupted:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        raise KeyboardInterrupt
