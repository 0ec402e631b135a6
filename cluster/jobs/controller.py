"""Starts and ends coordinators: again and again, it compares the jobs in the database with the coordinators that run.

What the controller keeps beside the database is only what it saw, to notice coordinators that die, and to say a thing once. It
may be killed at any time: each step starts from the state that it finds, whatever that is. What fails at one job keeps no other
from its turn.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Protocol

from chainfed_ray.activity import Activity
from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.cluster.draining import Drain
from chainfed_ray.cluster.jobs.cleanup import clean_up, described, fail, has_died_too_often, note_bytes, pause
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.client_memory import check_fits, memory_at_once, why_it_waits
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.cluster.structured_logs import about
from chainfed_ray.cluster.tables import JobRecord
from chainfed_ray.errors import InvalidJob
from chainfed_ray.reading import OF_DISKS
from chainfed_ray.records.states import AT_WORK, FINISHED

_INTERVAL_SECONDS = 0.5  # between two steps
_DATABASE_RETRY_SECONDS = 5.0
_OVER_BEFORE = 1000  # jobs, the newest
_DELETED_AT_ONCE = 100  # jobs in a step

_log = logging.getLogger(__name__)


class Coordinators(Protocol):
    """The coordinators: one process for each running job."""

    def alive(self) -> set[str]:
        """The ids of the jobs that have a coordinator."""
        ...

    def ensure(self, job: str) -> None:
        """Start a coordinator for ``job``, unless it has one."""
        ...

    def end(self, job: str) -> bool:
        """End the coordinator of ``job``, and the processes of its clients. True once its own process is gone."""
        ...

    def clear_scratch(self, jobs: Sequence[str]) -> None:
        """Delete the prefix caches of ``jobs`` on every machine, as soon as no process uses them any more."""
        ...

    def clear_copies(self, jobs: Sequence[str]) -> None:
        """Delete the copies of deleted ``jobs`` that machines have, where their commits are in an object store."""
        ...


class Controller:
    """Keeps up to ``settings.parallel_jobs`` jobs of the queue running."""

    def __init__(self, settings: Settings, store: JobStore, coordinators: Coordinators) -> None:
        self._settings, self._store, self._coordinators = settings, store, coordinators
        self._begun, self._drain = False, Drain(settings.storage.root)
        self._had: set[str] = set()  # jobs that had a coordinator at the last step
        self._kept: set[str] = set()  # jobs whose files could not be deleted
        self._waiting: set[tuple[str, int]] = (
            set()
        )  # jobs that are said to wait for memory, by the event that queued them

    def run(self, stop: Event) -> None:
        """Call ``step`` until ``stop`` is set, unless the service drains. If the database does not answer, try again later."""
        while not stop.is_set():
            try:
                if not self._drain.has_begun():
                    self.step()
            except NO_ANSWER as error:
                _log.warning("the database does not answer (%s); waiting for it", error)
                stop.wait(_DATABASE_RETRY_SECONDS)
            stop.wait(_INTERVAL_SECONDS)

    def step(self) -> None:
        """Compare jobs and coordinators once, and start or end coordinators so that they match."""
        alive = self._coordinators.alive()
        over: set[str] = set() if self._begun else self._over_before()

        # 1. End cancelled jobs. Their commits are kept; their prefix caches and the secret that samples are drawn from are not.
        for job in self._store.page(status="cancelling"):
            with _apart(job.id, job.tenant):
                self._end_cancelled(job.id, over)
        gone = set[str]()
        for deleted in self._store.deletions.marked(_DELETED_AT_ONCE):
            with _apart(deleted):
                self._delete(deleted, gone)
        if gone:
            self._coordinators.clear_copies(sorted(gone))
            over |= gone

        # 2. A job whose coordinator died while it was to pause is paused as soon as no process of it is left.
        for job in self._store.page(status="pausing"):
            with _apart(job.id, job.tenant):
                if job.id not in alive and self._coordinators.end(job.id):
                    pause(job.id, self._store, self._settings.storage)

        # 3. End coordinators whose job is over, or paused. An idle one would keep the autoscaler from giving its machine back.
        at_work = self._store.page(limit=self._settings.parallel_jobs + 1000, status=AT_WORK)
        running, tenants = {job.id: job.tenant for job in at_work}, Counter(job.tenant for job in at_work)
        cancelling = {job.id for job in self._store.page(status="cancelling")}
        idle = alive - running.keys() - cancelling
        for job_id in idle:
            with _apart(job_id):
                self._coordinators.end(job_id)
        goes_on = {job_id for job_id, state in self._store.states(idle).items() if state not in FINISHED}
        over |= idle - goes_on  # the caches of a job that goes on later are of use then
        if over:
            self._coordinators.clear_scratch(sorted(over))
        self._begun = True

        # 4. Start a coordinator for each job at work that has none, as after the loss of the whole cluster. One that is gone
        #    though this controller saw or started it has died at its start: Ray makes others again by itself.
        died, self._had = self._had - alive, alive & running.keys()
        for job_id in running.keys() - alive:
            with _apart(job_id, running[job_id]):
                if job_id not in died or not has_died_too_often(job_id, self._store, self._settings.storage):
                    self._start(job_id)

        # 5. Start queued jobs, if there are free places: of tenants that may have another one at work, each in its turn.
        free, full, held = self._settings.parallel_jobs - len(running), set[str](), Counter[str]()
        for job in at_work:
            held[job.tenant] += self._memory(job)
        waiting = set[tuple[str, int]]()
        while free > 0:
            # A job that was resumed at once may still have the coordinator that it had before: that one ends first.
            found = self._store.turns.next(tenants, self._settings.running_jobs, besides=alive, full=full)
            if found is None:
                break
            job_id, tenant = found
            needed: int | None = None
            with _apart(job_id, tenant):
                needed = self._begin(job_id, held[tenant], waiting)
            if needed is None:
                full.add(tenant)  # a smaller one of its jobs does not go before: the greater one might wait for ever
                continue
            free, held[tenant], tenants[tenant] = free - 1, held[tenant] + needed, tenants[tenant] + 1
            self._store.turns.take(tenant)
            with _apart(job_id, tenant):
                self._start(job_id)
        self._waiting = waiting

    def _memory(self, job: JobRecord) -> int:
        """The memory of a job's clients, where there is a limit of it."""
        return memory_at_once(job.spec, self._settings.client_slots) if self._is_limited(job) else 0

    def _is_limited(self, job: JobRecord) -> bool:
        return self._settings.client_memory is not None and not job.reads_anything  # or it was submitted without a key

    def _begin(self, job: str, held: int, waiting: set[tuple[str, int]]) -> int | None:
        """Move a queued job to its work, where the tenant's others hold so much memory. Returns what its own clients hold.

        None if it does not begin. One that waits for memory says so once, and is added to those that are ``waiting``. One that
        never fits goes to be validated, and fails there.
        """
        most, needed = self._settings.client_memory, 0
        never_fits = False
        if most is not None:
            needed = self._memory(self._store.get(job))
            never_fits = needed > most
            if not never_fits and needed + held > most:
                queued = self._store.newest(job, "queued")
                place = (job, queued.seq if queued else 0)  # a job that is queued again may wait again
                if place not in self._waiting:
                    self._store.publish(
                        job, f"waiting-{place[1]}", "waiting", {"message": why_it_waits(needed, held, most)}
                    )
                waiting.add(place)
                return None
        begun = not never_fits and self._store.newest(job, "started") is not None
        if not self._store.move(job, "running" if begun else "validating"):
            return None
        return 0 if never_fits else needed

    def _end_cancelled(self, job: str, over: set[str]) -> None:
        """End a job that is cancelled. If that is done, it is added to those that are ``over``."""
        if self._coordinators.end(job):  # or the coordinator would make anew what is deleted
            broken = clean_up(job, self._settings.storage)
            if broken and broken.errno in OF_DISKS:  # a later step tries again
                return
            note_bytes(job, self._store, self._settings.storage)
            self._store.move(job, "cancelled", error=described(broken) if broken else None)
            over.add(job)

    def _delete(self, job: str, gone: set[str]) -> None:
        """Delete the files of a job that is being deleted, and then its row: then it is added to those that are ``gone``.

        A later step tries again, if a file cannot be deleted.
        """
        if not self._coordinators.end(job):
            return
        try:
            clean_up(job, self._settings.storage)
            self._settings.storage.remove(job)
        except OSError as error:
            if job not in self._kept:  # said once
                _log.warning("the files of job %s cannot be deleted yet: %s", job, error)
            self._kept.add(job)
            return
        self._store.deletions.purge(job)
        self._kept.discard(job)
        gone.add(job)

    def _over_before(self) -> set[str]:
        """Jobs that were over before this controller began: the one before may have died before it deleted their caches."""
        return {job.id for job in self._store.page(limit=_OVER_BEFORE) if job.status in FINISHED}

    def _start(self, job: str) -> None:
        """Start the coordinator of ``job``. It takes seconds, so the job's record says that it is starting.

        A job that is to be validated, and whose clients never fit, fails instead: the limit may be lower than when it came.
        """
        if self._settings.client_memory is not None:
            record = self._store.get(job)
            if record.status == "validating" and self._is_limited(record):
                try:
                    check_fits(record.spec, self._settings.client_slots, self._settings.client_memory)
                except InvalidJob as error:
                    fail(job, error, self._store, self._settings.storage)
                    return
        self._had.add(job)
        self._store.note_activity(job, Activity(what="starting the process of the coordinator"))
        self._coordinators.ensure(job)


@contextmanager
def _apart(job: str, tenant: str | None = None) -> Iterator[None]:
    """A part of a step that is about ``job`` alone. If it fails, the step goes on with other jobs, and the next tries again.

    Its lines in the log name the job, and its ``tenant`` where that is known: of a job that is gone it is not.
    """
    with about(job=job, **{"tenant": tenant} if tenant else {}):
        try:
            yield
        except NO_ANSWER:
            raise
        except Exception:  # whatever it is, others must not wait for it
            _log.exception("a step of the controller failed at job %s", job)
