"""Tells what happens to jobs to all who watch: one poll of the database serves every watcher of a process."""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.tables import Event, Latest
from chainfed_ray.cluster.tenants import DEFAULT_TENANT
from chainfed_ray.errors import JobNotFound, ServiceBusy
from chainfed_ray.records.states import FINISHED

POLL_SECONDS = 0.5
_SILENCE_SECONDS = 15.0
MOST_WATCHERS = 1000
MOST_OF_TENANT = 500
_MOST_RECENT = 100  # events that are kept for those who watch a job
_PAGE = 1000
_RETRY_SECONDS = 10

_log = logging.getLogger(__name__)


@dataclass
class _Watched:
    """A job that somebody watches. ``change`` is set, and replaced, when something new is known about it."""

    watchers: int = 0
    seq: int = 0
    activity: dict[str, Any] | None = None
    deleted: bool = False
    recent: deque[Event] = field(default_factory=lambda: deque(maxlen=_MOST_RECENT))
    change: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        """Wake whoever waits for a change."""
        self.change.set()
        self.change = asyncio.Event()


@dataclass(frozen=True)
class Busy:
    """What a job is doing, as JSON."""

    activity: dict[str, Any]


class EventFeed:
    """The events of jobs as they come. It polls ``store`` while anybody watches. All calls come from one event loop.

    Once the service ``drains``, nobody watches any more: who did asks again.
    """

    def __init__(self, store: JobStore, drains: Callable[[], bool] = lambda: False) -> None:
        self._store, self._drains = store, drains
        self._jobs: dict[str, _Watched] = {}
        self._polling: asyncio.Task[None] | None = None
        self._of_tenants = Counter[str]()

    def check_room(self, tenant: str) -> None:
        """Check that one more of ``tenant`` may watch.

        Raises:
            ServiceBusy: too many watch already, of all tenants or of this one.
        """
        if self._of_tenants.total() >= MOST_WATCHERS:
            raise ServiceBusy("watchers of jobs", _RETRY_SECONDS)
        if self._of_tenants[tenant] >= MOST_OF_TENANT:
            raise ServiceBusy("watchers of jobs of one tenant", _RETRY_SECONDS)

    async def watch(
        self, job: str, after: int, tenant: str = DEFAULT_TENANT
    ) -> AsyncGenerator[Event | Busy | None, None]:
        """Yield the events of ``job`` with numbers above ``after`` until the job is over, and what it is doing.

        Whoever watches is of ``tenant``.

        Yields None after some silence. The events of a job that is deleted end.
        """
        told, last = None, ""
        with self._watched(job, tenant) as watched:
            while True:
                change = watched.change
                if watched.deleted or self._drains():
                    return
                while found := await self._after(job, watched, after):
                    for event in found:
                        yield event
                    after, last = found[-1].seq, found[-1].kind
                if last in FINISHED:
                    return
                if watched.activity is not None and watched.activity != told:
                    yield Busy(watched.activity)
                told = watched.activity
                try:
                    await asyncio.wait_for(change.wait(), _SILENCE_SECONDS)
                except TimeoutError:
                    yield None

    async def _after(self, job: str, watched: _Watched, after: int) -> list[Event]:
        """The events with numbers above ``after``: from those that were read for all, if none is missing there."""
        new = [event for event in watched.recent if event.seq > after]
        if new and new[0].seq == after + 1:
            return new
        if 0 < watched.seq <= after:
            return []
        try:
            return await asyncio.to_thread(self._store.events, job, after, _PAGE)
        except JobNotFound:
            watched.deleted = True
            return []

    @contextmanager
    def _watched(self, job: str, tenant: str) -> Iterator[_Watched]:
        watched = self._jobs.setdefault(job, _Watched())
        watched.watchers += 1
        self._of_tenants[tenant] += 1
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        try:
            yield watched
        finally:
            watched.watchers -= 1
            self._of_tenants[tenant] -= 1
            self._of_tenants += Counter()  # forgets tenants that watch no more
            if not watched.watchers:
                del self._jobs[job]
            if not self._jobs and self._polling is not None:
                self._polling.cancel()
                self._polling = None

    async def _poll(self) -> None:
        while True:
            try:
                await self._look()
            except SQLAlchemyError as error:
                _log.warning("the database does not answer (%s); watchers of jobs wait for it", type(error).__name__)
            await asyncio.sleep(POLL_SECONDS)

    async def _look(self) -> None:
        if self._drains():
            for one in self._jobs.values():
                one.tell()
            return
        asked = list(self._jobs)
        latest = await asyncio.to_thread(self._store.latest, asked)
        for job in asked:
            if watched := self._jobs.get(job):
                try:
                    await self._compare(job, watched, latest.get(job))
                except JobNotFound:  # deleted since
                    watched.deleted = True
                    watched.tell()

    async def _compare(self, job: str, watched: _Watched, newest: Latest | None) -> None:
        """Tell the watchers of a job what is new.

        Raises:
            JobNotFound: it was deleted.
        """
        if newest is None:
            raise JobNotFound(job)
        seq, activity = newest
        if (seq, activity) == (watched.seq, watched.activity):
            return
        if 0 < watched.seq < seq and (found := await asyncio.to_thread(self._store.events, job, watched.seq, _PAGE)):
            watched.recent.extend(found)
            seq = found[-1].seq
        watched.seq, watched.activity = seq, activity
        watched.tell()
