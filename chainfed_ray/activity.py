"""Progress reports: what a job is doing now, and how far it is.

The code that does the work reports every finished part. The listener decides how much of that to show or keep, and how often:
it may write to a terminal, a log or the job's record. One activity runs at a time, and lasts until the next is reported.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


class Activity(BaseModel):
    """A piece of work in progress, and how far it is."""

    model_config = ConfigDict(frozen=True)

    what: str = Field(description="what is being done, such as `fitting the head of stage 1`")
    done: int = Field(0, description="how many of the `total` parts are done")
    total: int | None = Field(None, description="how many parts there are; null if unknown")
    unit: str | None = Field(
        None, description="what a part is: `clients`, `rows`, `layers`, …; null if `total` is null"
    )
    note: str | None = Field(None, description="what the work is waiting for; null if it is not waiting")
    since: datetime = Field(
        default_factory=lambda: datetime.now(UTC), description="when the activity began: ISO 8601, UTC"
    )
    seconds_left: float | None = Field(
        None, description="an estimate from the time that the finished parts took; null until there are some"
    )


Listener = Callable[[Activity], None]
"""Receives each report. It must return quickly. Its result is ignored, so the work is the same whoever listens; an exception
that it raises ends the work.
"""


Note = Callable[[str | None], None]
"""Receives what the current activity is waiting for, and None when the wait is over."""


def no_listener(_: Activity) -> None:
    """The default listener: ignores every report."""


@dataclass(frozen=True)
class Reporter:
    """Reports the progress of the work called ``what`` to ``listen``."""

    what: str = ""
    listen: Listener = no_listener

    def begin(self) -> None:
        """Report the start of work whose progress cannot be measured."""
        self.listen(Activity(what=self.what))

    def count(self, total: int, unit: str) -> Callable[[int], None]:
        """Report the start of work that has ``total`` parts. The function returned reports how many of them are done."""
        begun, started = Activity(what=self.what, total=total, unit=unit), perf_counter()
        first = 0

        def report(done: int) -> None:
            nonlocal first
            done = min(done, total)
            first = first or done
            # The first part may include the start of processes, so its time says little about the others.
            known = done > 0 and (first < done or done == total)
            left = (perf_counter() - started) / done * (total - done) if known else None
            self.listen(begun.model_copy(update={"done": done, "seconds_left": left}))

        self.listen(begun)
        return report

    def each(self, items: Iterable[T], total: int, unit: str, size: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
        """Iterate over ``items`` and report progress towards ``total``; an item counts for ``size(item)`` parts.

        An item counts as done when the next one is requested. No reference to it is kept after that, because items may be
        large.
        """
        if self.listen is no_listener or not total:
            yield from items
            return
        report, done = self.count(total, unit), 0
        for item in items:
            done += size(item)
            yield item
            del item
            report(done)


class Notes:
    """A listener that adds a note to each activity and passes it on to ``listen``.

    The code that carries out the work knows why it is waiting, but not which activity it is part of.
    """

    def __init__(self, listen: Listener) -> None:
        self._listen = listen
        self._activity: Activity | None = None
        self._note: str | None = None

    def __call__(self, activity: Activity) -> None:
        """See ``Listener``."""
        self._activity = activity
        self._listen(activity.model_copy(update={"note": self._note}))

    def note(self, words: str | None) -> None:
        """See ``Note``."""
        if words != self._note:
            self._note = words
            if self._activity is not None:
                self(self._activity.model_copy(update={"seconds_left": None}))  # the estimate did not include the wait


SILENT = Reporter()
"""The reporter of work that nobody listens to."""
