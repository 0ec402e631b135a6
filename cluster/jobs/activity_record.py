"""Writes what a running job is doing into the database, from a thread of its own, so that the job never waits for that."""

import logging
from threading import Event, Thread
from types import TracebackType
from typing import Self

from sqlalchemy.exc import SQLAlchemyError

from chainfed_ray.activity import Activity
from chainfed_ray.cluster.jobs.store import JobStore

_INTERVAL_SECONDS = 2.0  # the least time between two writes

_log = logging.getLogger(__name__)


class ActivityRecord:
    """A ``Listener`` that writes the newest activity of ``job`` to ``store``. A context manager.

    Writes at most once per ``interval`` seconds. If the database does not answer, a later activity is written instead.
    """

    def __init__(self, store: JobStore, job: str, interval: float = _INTERVAL_SECONDS) -> None:
        self._store, self._job, self._interval = store, job, interval
        self._newest: Activity | None = None
        self._changed, self._over = Event(), Event()
        self._thread = Thread(target=self._write, daemon=True)

    def __call__(self, activity: Activity) -> None:
        """See ``Listener``."""
        self._newest = activity
        self._changed.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._changed.set()
        self._thread.join()

    def _write(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            if self._over.is_set():
                return
            assert self._newest, "an activity was set before the event"
            try:
                self._store.note_activity(self._job, self._newest)
            except SQLAlchemyError as error:
                _log.debug("the activity of job %s was not written: %s", self._job, error)
            self._over.wait(self._interval)
