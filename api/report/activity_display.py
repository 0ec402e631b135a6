"""Shows the current activity to a person: in one updating line on a terminal, in lines of a log elsewhere."""

from threading import Event, Thread
from time import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from chainfed_ray.activity import Activity
from chainfed_ray.api.report.activity_log import ActivityLog, in_words

_TICK_SECONDS = 1.0


class ActivityDisplay:
    """A ``Listener`` that shows the newest activity; on a terminal, above a panel. A context manager.

    ``is_live`` is true on a terminal that can redraw lines that it has shown.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.is_live = console.is_terminal and not console.is_dumb_terminal
        self._log = ActivityLog(lambda words: console.print(words, markup=False, soft_wrap=True))
        self._activity: Activity | None = None
        self._told = 0.0
        self._panel: RenderableType = Text("")
        # local_ray redirects standard output too, and for longer: rich would restore it too early.
        self._live = Live(console=console, get_renderable=self.drawn, transient=True, redirect_stdout=False)
        self._over = Event()
        self._ticking = Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        if self.is_live:
            self._live.start()
        else:
            self._ticking.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.end()
        self._over.set()
        if self.is_live:
            self._live.stop()
        else:
            self._ticking.join()

    def __call__(self, activity: Activity) -> None:
        """See ``Listener``."""
        if self.is_live:
            self._activity, self._told = activity, time()
        else:
            self._log(activity)

    def end(self) -> None:
        """The activity is over, and no other has begun."""
        self._activity = None
        self._log.end()

    def show(self, panel: RenderableType) -> None:
        """Replace the panel."""
        self._panel = panel
        if self.is_live:
            self._live.refresh()

    def drawn(self) -> RenderableType:
        """The line of the activity, and the panel below it. The thread that redraws the terminal calls this."""
        activity, now, line = self._activity, time(), Text("", style="cyan")
        if activity is not None:
            line.append(in_words(activity, max(now - activity.since.timestamp(), 0.0), now - self._told))
            line.truncate(self._console.width, overflow="ellipsis")
        return Group(line, self._panel)

    def _tick(self) -> None:
        while not self._over.wait(_TICK_SECONDS):
            self._log.tick()
