"""Keeps what was loaded within a number of bytes: what was used least recently makes room for what is wanted now."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

from chainfed_ray.errors import InvalidJob, ServiceBusy
from chainfed_ray.units import format_bytes

_RETRY_SECONDS = 5


@dataclass(eq=False)
class _Entry:
    num_bytes: int
    users: int = 1
    value: Any = None
    failed: Exception | None = None
    loaded: Event = field(default_factory=Event)

    @property
    def in_use(self) -> bool:
        return self.users > 0 or not getattr(self.value, "is_idle", True)


class Shelf:
    """Loaded models and stacks of ``most_bytes`` together. Several threads may use it.

    A value with an attribute ``is_idle`` stays while that is False; any other may go when nobody is ``using`` it.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.found, self.loaded = 0, 0  # how often a value was there, and how often it was loaded
        self._held: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = Lock()

    @property
    def held_bytes(self) -> int:
        """The bytes of all that is held."""
        return sum(entry.num_bytes for entry in self._held.values())

    def holds(self, key: Hashable) -> bool:
        """True if the value of ``key`` is there, or is being loaded."""
        return key in self._held

    def let_go(self, key: Hashable) -> None:
        """Let go of the value of ``key``, unless it is in use."""
        with self._lock:
            if (entry := self._held.get(key)) and not entry.in_use:
                del self._held[key]

    @contextmanager
    def using(self, key: Hashable, size: Callable[[], int], load: Callable[[], Any]) -> Iterator[Any]:
        """The value of ``key``, which stays for the length of the block. ``load`` loads it; ``size`` tells its bytes before.

        Raises:
            InvalidJob: it has more bytes than there may be.
            ServiceBusy: what is in use leaves no room.
        """
        entry, is_new = self._entry(key, size)
        try:
            if is_new:
                self._load(key, entry, load)
            entry.loaded.wait()
            if entry.failed:
                raise entry.failed
            yield entry.value
        finally:
            with self._lock:
                entry.users -= 1

    def _entry(self, key: Hashable, size: Callable[[], int]) -> tuple[_Entry, bool]:
        """The entry of ``key``, and whether it is new."""
        needed = 0 if key in self._held else size()  # before the lock: it may have to wait for a download
        with self._lock:
            if entry := self._held.get(key):
                self._held.move_to_end(key)
                entry.users += 1
                self.found += 1
                return entry, False
            entry = _Entry(needed or size())
            self._make_room(entry.num_bytes)
            self._held[key] = entry
            self.loaded += 1
            return entry, True

    def _load(self, key: Hashable, entry: _Entry, load: Callable[[], Any]) -> None:
        try:
            entry.value = load()
        except Exception as error:
            entry.failed = error
            with self._lock:
                del self._held[key]
        finally:
            entry.loaded.set()

    def _make_room(self, needed: int) -> None:
        if needed > self.most_bytes:
            most, size = format_bytes(self.most_bytes), format_bytes(needed)
            raise InvalidJob.at(
                "model", size, f"a model of at most {most}, the memory for models (CHAINFED_SERVING_MEMORY)"
            )
        for key in [key for key, entry in self._held.items() if not entry.in_use]:
            if self.held_bytes + needed <= self.most_bytes:
                return
            del self._held[key]
        if self.held_bytes + needed > self.most_bytes:
            raise ServiceBusy("models in use", _RETRY_SECONDS)
