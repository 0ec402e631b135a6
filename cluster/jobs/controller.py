"""Starts and ends coordinators: again and again, it compares the jobs in the database with the coordinators that run.

The controller keeps no state of its own beside the database. It may be killed at any time: each step starts from the state
that it finds, whatever that is.
"""

import logging
from threading import Event
from typing import Protocol

from sqlalchemy.exc import OperationalError

from chainfed_ray.activity import Activity
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.records.commit_log import CommitLog

_INTERVAL_SECONDS = 0.5  # between two steps
_DATABASE_RETRY_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Coordinators(Protocol):
    """The coordinators: one process for each running job."""

    def alive(self) -> set[str]:
        """The ids of the jobs that have a coordinator."""
        ...

    def ensure(self, job: str) -> None:
        """Start a coordinator for ``job``, unless it has one."""
        ...

    def end(self, job: str) -> None:
        """End the coordinator of ``job``, and the processes of its clients."""
        ...


class Controller:
    """Keeps up to ``settings.parallel_jobs`` jobs of the queue running."""

    def __init__(self, settings: Settings, store: JobStore, coordinators: Coordinators) -> None:
        self._settings, self._store, self._coordinators = settings, store, coordinators

    def run(self, stop: Event) -> None:
        """Call ``step`` until ``stop`` is set. If the database does not answer, try again later."""
        while not stop.is_set():
            try:
                self.step()
            except OperationalError as error:
                _log.warning("the database does not answer (%s); waiting for it", error)
                stop.wait(_DATABASE_RETRY_SECONDS)
            stop.wait(_INTERVAL_SECONDS)

    def step(self) -> None:
        """Compare jobs and coordinators once, and start or end coordinators so that they match."""
        alive = self._coordinators.alive()

        # 1. End cancelled jobs. Their commits are kept; their prefix caches and the secret that samples are drawn from are not.
        for job in self._store.page(status="cancelling"):
            if job.id in alive:
                self._coordinators.end(job.id)
            self._settings.storage.clear_scratch(job.id)
            CommitLog(self._settings.storage.job(job.id)).erase_secret()
            self._store.move(job.id, "cancelled")

        # 2. End coordinators whose job is over. An idle one would keep the autoscaler from giving its machine back.
        running = {job.id for job in self._store.page(limit=self._settings.parallel_jobs + 1000, status="running")}
        for finished in alive - running:
            self._coordinators.end(finished)

        # 3. Start a coordinator for each running job that has none, as after the loss of the whole cluster.
        for job_id in running - alive:
            self._start(job_id)

        # 4. Start the oldest queued jobs, if there are free places.
        for queued in self._store.queue(limit=max(self._settings.parallel_jobs - len(running), 0)):
            if self._store.move(queued.id, "running"):
                self._start(queued.id)

    def _start(self, job: str) -> None:
        """Start the coordinator of ``job``. It takes seconds, so the job's record says that it is starting."""
        self._store.note_activity(job, Activity(what="starting the process of the coordinator"))
        self._coordinators.ensure(job)
