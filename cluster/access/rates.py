"""How many requests a tenant, or a key, may send: a bucket of tokens for each, which fills up over a minute."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

_MINUTE = 60.0
_MOST_KNOWN = 10_000  # of those who send
_ROUNDING = 1e-6  # of a token: a sum of parts of one may be a little less than one


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class Rates:
    """Lets each who sends, a tenant or a key, send ``per_minute`` requests a minute, or as many at once after a minute of rest.

    None lets all pass. Each process counts by itself.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, _Bucket] = {}

    def wait_seconds(self, who: str, per_minute: int | None = None) -> int:
        """Count a request of ``who``, to whom another limit may apply than to the others.

        0 if it may pass; otherwise, it is not counted, and may in so many seconds.
        """
        most = per_minute or self.per_minute
        if most is None:
            return 0
        now = self._clock()
        bucket = self._buckets.get(who)
        if bucket is None:
            self._make_room(now)
            bucket = self._buckets[who] = _Bucket(most, now)
        a_second = most / _MINUTE
        bucket.tokens = min(most, bucket.tokens + (now - bucket.filled_at) * a_second)
        bucket.filled_at = now
        if bucket.tokens < 1 - _ROUNDING:
            return math.ceil((1 - bucket.tokens) / a_second)
        bucket.tokens -= 1
        return 0

    def give_back(self, who: str) -> None:
        """Do not count the request of ``who`` that has just passed: another limit refused it."""
        if bucket := self._buckets.get(who):
            bucket.tokens += 1

    def _make_room(self, now: float) -> None:
        """Forget those whose buckets are full again: a new bucket is full as well."""
        if len(self._buckets) >= _MOST_KNOWN:
            self._buckets = {who: bucket for who, bucket in self._buckets.items() if now - bucket.filled_at < _MINUTE}
