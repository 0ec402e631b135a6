"""How many requests of a tenant, and of all, may wait for something at once."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from chainfed_ray.errors import ServiceBusy

MOST_WAITING = 200
MOST_OF_TENANT = 50
_RETRY_SECONDS = 10  # until one of those that wait may be answered


class Waiting:
    """The requests that wait for ``what``. All calls come from one event loop."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._counts: Counter[str] = Counter()

    @contextmanager
    def one_more(self, tenant: str) -> Iterator[None]:
        """Count a request of ``tenant`` for a block.

        Raises:
            ServiceBusy: too many wait already, of all tenants or of this one.
        """
        if self._counts.total() >= MOST_WAITING or self._counts[tenant] >= MOST_OF_TENANT:
            raise ServiceBusy(f"requests that wait for {self._what}", _RETRY_SECONDS)
        self._counts[tenant] += 1
        try:
            yield
        finally:
            self._counts[tenant] -= 1
            self._counts += Counter()  # forgets tenants that wait no more
