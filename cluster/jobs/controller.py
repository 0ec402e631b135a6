"""From queued jobs to running coordinators: what there should be, compared with what there is, again and again.

The controller has no memory but the database. It may be killed at any time, and whatever state it finds when it is back, a
step leads from there to where things should be.
"""

import logging
from threading import Event
from typing import Protocol

from sqlalchemy.exc import OperationalError

from chainfed_ray.activity import Activity
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.records.commit_log import CommitLog

_INTERVAL_SECONDS = 0.5
_PATIENCE_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Coordinators(Protocol):
    """The processes in which jobs run."""

    def alive(self) -> set[str]:
        """The jobs that have one."""
        ...

    def ensure(self, job: str) -> None:
        """Give a job one, unless it has one."""
        ...

    def end(self, job: str) -> None:
        """End a job's, and with it those of its clients."""
        ...


class Controller:
    """Keeps ``settings.parallel_jobs`` jobs running, as long as some are queued."""

    def __init__(self, settings: Settings, store: JobStore, coordinators: Coordinators) -> None:
        self._settings, self._store, self._coordinators = settings, store, coordinators

    def run(self, stop: Event) -> None:
        """Step until ``stop`` is set; a database that does not answer is waited for."""
        while not stop.is_set():
            try:
                self.step()
            except OperationalError as error:
                _log.warning("the database does not answer (%s); waiting for it", error)
                stop.wait(_PATIENCE_SECONDS)
            stop.wait(_INTERVAL_SECONDS)

    def step(self) -> None:
        """One comparison."""
        alive = self._coordinators.alive()

        # 1. What was cancelled ends now; its commits stay, its caches and its secret go.
        for job in self._store.page(status="cancelling"):
            if job.id in alive:
                self._coordinators.end(job.id)
            self._settings.storage.clear_scratch(job.id)
            CommitLog(self._settings.storage.job(job.id)).erase_secret()
            self._store.move(job.id, "cancelled")

        # 2. A coordinator whose job is over has nothing to do, and would keep its machine from being given back.
        running = {job.id for job in self._store.page(limit=self._settings.parallel_jobs + 1000, status="running")}
        for finished in alive - running:
            self._coordinators.end(finished)

        # 3. A running job has a coordinator, also after the loss of the whole cluster.
        for job_id in running - alive:
            self._start(job_id)

        # 4. What waits longest takes the free places.
        for waiting in self._store.queue(limit=max(self._settings.parallel_jobs - len(running), 0)):
            if self._store.move(waiting.id, "running"):
                self._start(waiting.id)

    def _start(self, job: str) -> None:
        """Give a job its coordinator, which takes seconds to start."""
        self._store.note_activity(job, Activity(what="starting the process of the coordinator"))
        self._coordinators.ensure(job)
