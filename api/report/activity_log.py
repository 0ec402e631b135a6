"""Describes activities in sentences: for the line on a terminal, and for a log, which skips those that take only seconds."""

from collections.abc import Callable
from threading import Lock
from time import time

from chainfed_ray.activity import Activity
from chainfed_ray.units import format_seconds

_QUIET_SECONDS = 3.0  # a shorter activity gets no line
_LONG_SECONDS = 10.0  # an activity of this length also gets a line when it ends
_AGAIN_SECONDS = 10.0  # the least time between two lines of one activity …
_AGAIN_SHARE = 0.1  # … or this share of its time so far, if that is more: an hour must not give 360 lines


def in_words(activity: Activity, elapsed: float, silent: float = 0.0) -> str:
    """Describe an activity that began ``elapsed`` seconds ago, and was last reported ``silent`` seconds ago."""
    words = _capital(activity.what)
    if activity.total is not None:
        words += f": {activity.done} of {activity.total} {activity.unit}"
    words += f", {format_seconds(elapsed)} so far"
    if activity.seconds_left is not None and (left := activity.seconds_left - silent) >= 1:
        words += f", about {format_seconds(left)} left"
    return words if activity.note is None else f"{words}; {activity.note}"


class ActivityLog:
    """A ``Listener`` that writes lines about an activity: after its first seconds, from time to time, and at its end.

    Call ``tick`` about every second, from any thread. ``say`` writes a line; ``clock`` gives the seconds since 1970.
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
        """Write a line, if one is due."""
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
        # Never negative: the activity may have begun on a machine whose clock is ahead.
        return max(self._clock() - activity.since.timestamp(), 0.0)


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
