"""Tells processes at sites that an order waits for them: one poll of the database serves all that ask this replica."""

import asyncio
import logging
from collections import Counter

from sqlalchemy.exc import SQLAlchemyError

from chainfed_ray.cluster.sites.mailbox import Mailbox

_POLL_SECONDS = 0.1
_log = logging.getLogger(__name__)


class OrderFeed:
    """Polls ``mailbox`` while anybody waits. All calls come from one event loop."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._waiting: Counter[str] = Counter()
        self._change = asyncio.Event()
        self._found: set[str] = set()
        self._polling: asyncio.Task[None] | None = None

    async def wait(self, site: str, seconds: float) -> None:
        """Wait until an order waits for ``site``, at most ``seconds``."""
        self._waiting[site] += 1
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await self._change.wait()
                    if site in self._found:
                        return
        except TimeoutError:
            return
        finally:
            self._waiting[site] -= 1

    async def _poll(self) -> None:
        while sites := [site for site, count in self._waiting.items() if count]:
            await asyncio.sleep(_POLL_SECONDS)
            try:
                self._found = await asyncio.to_thread(self._mailbox.waiting, sites)
            except SQLAlchemyError as error:
                _log.warning("the database does not answer (%s); sites wait for it", type(error).__name__)
                continue
            if self._found:
                self._change.set()
                self._change = asyncio.Event()
