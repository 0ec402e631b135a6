"""What a job is busy with, told while it goes on: to a terminal, to a log, to the job's record, or to nobody.

Activities follow one another: each lasts until the next is told. Whoever does the work tells of every part that is done; how
much of that is shown or kept, and how often, is the listener's business.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


class Activity(BaseModel):
    """A piece of work that goes on, and how far it is."""

    model_config = ConfigDict(frozen=True)

    what: str = Field(description="in words, such as `fitting the head of stage 1`")
    done: int = Field(0, description="parts that are done, of `total`")
    total: int | None = Field(None, description="how many parts there are; null where that is not known")
    unit: str | None = Field(None, description="what a part is: `clients`, `rows`, `layers`, …; null without `total`")
    note: str | None = Field(None, description="what it waits for, in words; null if nothing is to be said")
    since: datetime = Field(default_factory=lambda: datetime.now(UTC), description="when it began: ISO 8601, UTC")
    seconds_left: float | None = Field(
        None, description="an estimate, from what the parts took that are done; null until some are"
    )


Listener = Callable[[Activity], None]
"""Is told of activities. It is to be quick, and is never asked for anything: the work is the same whoever listens. What it
raises ends the work, as any error does.
"""


Note = Callable[[str | None], None]
"""Is told what the present activity waits for; None once that is over."""


def no_listener(_: Activity) -> None:
    """The listener where nobody listens."""


@dataclass(frozen=True)
class Reporter:
    """Tells ``listen`` how far the work called ``what`` is."""

    what: str = ""
    listen: Listener = no_listener

    def begin(self) -> None:
        """Tell of work of which nobody knows how far it is, until it is over."""
        self.listen(Activity(what=self.what))

    def count(self, total: int, unit: str) -> Callable[[int], None]:
        """Tell of work of ``total`` parts, of which none is done. Call what is given with the number of those that are."""
        begun, started = Activity(what=self.what, total=total, unit=unit), perf_counter()
        first = 0

        def tell(done: int) -> None:
            nonlocal first
            done = min(done, total)
            first = first or done
            # Until the first part is done processes may have to start: it says little of the others.
            known = done > 0 and (first < done or done == total)
            left = (perf_counter() - started) / done * (total - done) if known else None
            self.listen(begun.model_copy(update={"done": done, "seconds_left": left}))

        self.listen(begun)
        return tell

    def each(self, items: Iterable[T], total: int, unit: str, size: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
        """``items``, of which there are ``total``; an item of a ``size`` counts as so many.

        An item is done when the next one is asked for. None is held on to while the next one is made: it may be large.
        """
        if self.listen is no_listener or not total:
            yield from items
            return
        tell, done = self.count(total, unit), 0
        for item in items:
            done += size(item)
            yield item
            del item
            tell(done)


class Notes:
    """A listener that puts a note on whatever it hears of, and passes it on to ``listen``.

    Who carries the work out often knows best why it does not get on, and does not know what it is.
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
                self(self._activity.model_copy(update={"seconds_left": None}))  # the estimate was of another moment


SILENT = Reporter()
"""Of work that nobody is told of."""
