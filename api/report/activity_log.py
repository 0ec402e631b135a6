"""What goes on, as lines for a log or words for a terminal: only of what takes more than seconds."""

from collections.abc import Callable
from threading import Lock
from time import time

from chainfed_ray.activity import Activity
from chainfed_ray.units import format_seconds

_QUIET_SECONDS = 3.0  # what is over by then is not worth a line
_LONG_SECONDS = 10.0  # what took as long has a line when it is over
_AGAIN_SECONDS = 10.0  # between two lines of what goes on
_AGAIN_SHARE = 0.1  # …or a share of the time that it has gone on: an hour is not 360 lines


def in_words(activity: Activity, elapsed: float, silent: float = 0.0) -> str:
    """How far an activity is, ``elapsed`` seconds after it began and ``silent`` ones after it was told."""
    words = _capital(activity.what)
    if activity.total is not None:
        words += f": {activity.done} of {activity.total} {activity.unit}"
    words += f", {format_seconds(elapsed)} so far"
    if activity.seconds_left is not None and (left := activity.seconds_left - silent) >= 1:
        words += f", about {format_seconds(left)} left"
    return words if activity.note is None else f"{words}; {activity.note}"


class ActivityLog:
    """Says a line once an activity has taken some seconds, again while it goes on, and when it is over.

    It is a listener. ``tick`` has to be called every second or so, from any thread; ``clock`` gives the seconds since 1970.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time) -> None:
        self._say, self._clock, self._lock = say, clock, Lock()
        self._activity: Activity | None = None
        self._told = 0.0
        self._said: float | None = None

    def __call__(self, activity: Activity) -> None:
        """See ``Listener``."""
        with self._lock:
            if self._activity is None or (activity.what, activity.since) != (self._activity.what, self._activity.since):
                self._close()
            self._activity, self._told = activity, self._clock()

    def tick(self) -> None:
        """Say a line, if it is time for one."""
        with self._lock:
            if self._activity is None:
                return
            now, elapsed = self._clock(), self._elapsed(self._activity)
            if self._said is None:
                due = elapsed >= _QUIET_SECONDS
            else:
                due = now - self._said >= max(_AGAIN_SECONDS, _AGAIN_SHARE * elapsed)
            if due:
                self._said = now
                self._say(in_words(self._activity, elapsed, now - self._told) + ".")

    def end(self) -> None:
        """The activity is over, and no other has begun."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._activity is not None and self._said is not None:
            elapsed = self._elapsed(self._activity)
            if elapsed >= _LONG_SECONDS:
                self._say(f"{_capital(self._activity.what)}: done in {format_seconds(elapsed)}.")
        self._activity = self._said = None

    def _elapsed(self, activity: Activity) -> float:
        # Not less than nothing: it may have begun on a machine whose clock is ahead.
        return max(self._clock() - activity.since.timestamp(), 0.0)


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
