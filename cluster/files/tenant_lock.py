"""The lock of a tenant's uploads. Few requests wait for it, and not for long: each takes a thread that other tenants need."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from threading import Lock
from time import monotonic, sleep
from typing import BinaryIO

from sqlalchemy import func, select
from sqlalchemy.engine import Engine

from chainfed_ray.cluster.files.upload_bytes import LOCK
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.tenants import lock_number
from chainfed_ray.errors import ServiceBusy

MOST_AT_ONCE = 8  # of a tenant in one process, of 40 threads that all requests share
_NUMBER = 0x75706C64  # PostgreSQL's first number of the locks of tenants' uploads
_LOOK_SECONDS = 0.02
_RETRY_SECONDS = 5


class TenantLocks:
    """The locks of all tenants: files in ``storage``. Machines that share no folder share locks of PostgreSQL, by ``engine``.

    A lock is waited for as long as ``wait_seconds``.
    """

    def __init__(self, storage: Storage, engine: Engine, wait_seconds: float) -> None:
        self._storage, self._wait_seconds = storage, wait_seconds
        self._shared = engine if storage.url is not None and engine.dialect.name == "postgresql" else None
        self._counts, self._counting = Counter[str](), Lock()

    @contextmanager
    def held(self, tenant: str) -> Iterator[None]:
        """Hold the lock of ``tenant`` for a block. No other thread of any process holds it meanwhile.

        Raises:
            ServiceBusy: others have it, or too many wait for it already.
        """
        folder, until = self._storage.uploads(tenant), monotonic() + self._wait_seconds
        with self._one_more(tenant), ExitStack() as until_done:
            folder.mkdir(parents=True, exist_ok=True)
            file = until_done.enter_context((folder / LOCK).open("ab"))
            _wait(lambda: _is_locked(file), until)
            if self._shared is not None:
                connection = until_done.enter_context(self._shared.connect())
                asked = select(func.pg_try_advisory_xact_lock(_NUMBER, lock_number(tenant)))
                _wait(lambda: bool(connection.scalar(asked)), until)
            yield

    @contextmanager
    def _one_more(self, tenant: str) -> Iterator[None]:
        with self._counting:
            if self._counts[tenant] >= MOST_AT_ONCE:
                raise _busy()
            self._counts[tenant] += 1
        try:
            yield
        finally:
            with self._counting:
                self._counts[tenant] -= 1
                self._counts += Counter()  # forgets tenants that have none


def _is_locked(file: BinaryIO) -> bool:
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(is_held: Callable[[], bool], until: float) -> None:
    """Try until ``is_held``, or the clock is at ``until``."""
    while not is_held():
        if monotonic() >= until:
            raise _busy()
        sleep(_LOOK_SECONDS)


def _busy() -> ServiceBusy:
    return ServiceBusy("changes of one tenant's uploads", _RETRY_SECONDS)
