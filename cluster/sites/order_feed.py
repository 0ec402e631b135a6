"""Tells processes at sites what they wait for: one poll of the database serves all that ask this replica."""

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass, field

from sqlalchemy.exc import SQLAlchemyError

from chainfed_ray.cluster.sites.mailbox import Mailbox, over_for

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0  # until it is looked again whether those who wait are still their sites' processes
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Wait:
    """The process ``session`` of ``site`` waits for an order. It keeps caches of ``jobs``."""

    site: str
    session: str
    jobs: Collection[str]
    over: asyncio.Event = field(default_factory=asyncio.Event)


class OrderFeed:
    """Polls ``mailbox`` while anybody waits. All calls come from one event loop."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._waits = set[_Wait]()
        self._polling: asyncio.Task[None] | None = None

    async def wait(self, site: str, session: str, jobs: Collection[str], seconds: float) -> None:
        """Wait until an order waits for ``site``, at most ``seconds``.

        The wait also ends when the site has another process than ``session``, and when one of ``jobs`` is over.
        """
        self._waits.add(wait := _Wait(site, session, jobs))
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        try:
            async with asyncio.timeout(seconds):
                await wait.over.wait()
        except TimeoutError:
            return
        finally:
            self._waits.discard(wait)

    async def _poll(self) -> None:
        loop = asyncio.get_running_loop()
        look_at = loop.time() + _LOOK_SECONDS
        while self._waits:
            await asyncio.sleep(_POLL_SECONDS)
            waits = [wait for wait in self._waits if not wait.over.is_set()]
            try:
                found = await asyncio.to_thread(self._mailbox.waiting, {wait.site for wait in waits})
                ended = [wait for wait in waits if wait.site in found]
                if loop.time() >= look_at:
                    look_at = loop.time() + _LOOK_SECONDS
                    ended += await asyncio.to_thread(self._changed, waits)
            except SQLAlchemyError as error:
                _log.warning("the database does not answer (%s); sites wait for it", type(error).__name__)
                continue
            for wait in ended:
                wait.over.set()

    def _changed(self, waits: Collection[_Wait]) -> list[_Wait]:
        """Those of ``waits`` whose site has another process now, or none, or of whose jobs one is over."""
        sessions = self._mailbox.sessions({wait.site for wait in waits})
        jobs = {job for wait in waits for job in wait.jobs}
        going = self._mailbox.going(jobs) if jobs else dict[str, str]()
        return [
            wait for wait in waits if sessions.get(wait.site) != wait.session or over_for(wait.site, wait.jobs, going)
        ]
