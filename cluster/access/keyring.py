"""The keys of a service as one of its processes knows them: looked at every few seconds, and not at every request."""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from sqlalchemy.exc import SQLAlchemyError, TimeoutError

from chainfed_ray.cluster.access.identity import Identity
from chainfed_ray.cluster.access.keys import Key, KeyStore, parts_of, this_hour
from chainfed_ray.cluster.database import NO_ANSWER

KEPT_SECONDS = 3.0
_log = logging.getLogger(__name__)


class KeyRing:
    """The keys in ``store``, which are looked at again when that is ``seconds`` ago. All calls come from one event loop.

    So a request costs no query, and a key that is revoked is accepted for ``seconds`` at most. A new key is accepted at once:
    before a key is refused because nothing is known of it, there is a new look. Requests that need one at the same time
    share it, so unknown keys, however many, cause one query at a time. Keys are read only if one was made or revoked.

    If the database does not answer, the errors of ``NO_ANSWER`` are raised, and nobody is let in by what was known before.
    """

    def __init__(self, store: KeyStore, seconds: float = KEPT_SECONDS, clock: Callable[[], float] = monotonic) -> None:
        self._store, self._seconds, self._clock = store, seconds, clock
        self._keys: dict[str, Key] = {}
        self._read_at: float | None = None  # when the query began
        self._reading = asyncio.Lock()
        self._state = (0, 0)
        self._failure: tuple[float, str] | None = None  # of the last query; an error would keep its frames
        self._uses_told: dict[str, str] = {}  # the hour of each key

    async def is_open(self) -> bool:
        """Whether no key was ever made. A service is open then, and stays closed once there was one, even a revoked one.

        A site's key counts as well: sites come from outside, through a proxy on this machine that would let others in, too.
        """
        await self._read(self._clock() - self._seconds)
        return not self._keys

    async def identify(self, token: str) -> Identity | None:
        """Who sends ``token``. None unless it is the token of a key that is neither revoked nor expired."""
        if (parts := parts_of(token)) is None:
            return None
        asked = self._clock()
        await self._read(asked - self._seconds)
        if (key := self._keys.get(parts[0])) is None:
            await self._read(asked)
            key = self._keys.get(parts[0])
        if key is None or not key.is_of(parts[1]) or not key.is_valid():
            return None
        self._note_use(key)
        return key.identity

    async def is_valid(self, identity: Identity) -> bool:
        """Whether one who was let in before would be now: with the same key, or without one as long as none was made."""
        await self._read(self._clock() - self._seconds)
        key = self._keys.get(identity.key)
        return key.is_valid() if key else not identity.key and not self._keys

    async def _read(self, since: float) -> None:
        """Look at the keys, unless that was done at the time ``since`` or later."""
        if self._was_read(since):
            return
        came = self._clock()
        async with self._reading:
            if self._was_read(since):  # another request did it meanwhile
                return
            if self._failure and self._failure[0] > came:  # or has failed, for all who waited: each try may take long
                raise TimeoutError(self._failure[1])
            began = self._clock()
            try:
                state = await asyncio.to_thread(self._store.state)
                if state != self._state:
                    self._keys = {key.id: key for key in await asyncio.to_thread(self._store.keys)}
                    self._state = state
            except NO_ANSWER as error:
                self._failure = (self._clock(), str(error))
                raise
            self._read_at, self._failure = began, None

    def _was_read(self, since: float) -> bool:
        return self._read_at is not None and self._read_at >= since

    def _note_use(self, key: Key) -> None:
        """Put the use of a key on record, once an hour. Nobody waits for it: a busy database does not hold up a request."""
        hour = this_hour()
        if hour in (key.used_at, self._uses_told.get(key.id)):
            return
        self._uses_told[key.id] = hour
        asyncio.get_running_loop().run_in_executor(None, self._write_use, key.id)

    def _write_use(self, key: str) -> None:
        try:
            self._store.note_use(key)
        except SQLAlchemyError as error:
            _log.warning("the use of the key %s was not put on record (%s)", key, type(error).__name__)
