"""What a job is busy with, kept on its record while it runs: by a thread of its own, so that no job waits for the database."""

import logging
from threading import Event, Thread
from types import TracebackType
from typing import Self

from sqlalchemy.exc import SQLAlchemyError

from chainfed_ray.activity import Activity
from chainfed_ray.cluster.jobs.store import JobStore

_INTERVAL_SECONDS = 2.0  # between two that are written

_log = logging.getLogger(__name__)


class ActivityRecord:
    """Listens to ``job``, and writes the newest of what it is told to ``store``; a context manager.

    A database that is away is no trouble: what goes on now is written when it is back.
    """

    def __init__(self, store: JobStore, job: str, interval: float = _INTERVAL_SECONDS) -> None:
        self._store, self._job, self._interval = store, job, interval
        self._newest: Activity | None = None
        self._told, self._over = Event(), Event()
        self._thread = Thread(target=self._write, daemon=True)

    def __call__(self, activity: Activity) -> None:
        """See ``Listener``."""
        self._newest = activity
        self._told.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._told.set()
        self._thread.join()

    def _write(self) -> None:
        while True:
            self._told.wait()
            self._told.clear()
            if self._over.is_set():
                return
            assert self._newest, "it was told of one"
            try:
                self._store.note_activity(self._job, self._newest)
            except SQLAlchemyError as error:
                _log.debug("the activity of job %s was not written: %s", self._job, error)
            self._over.wait(self._interval)
