"""The memory that a turn may take, held to: a process that would take more is stopped by an error, and goes on living.

Linux counts what a process may write to and shares with nobody (``VmData``); ``RLIMIT_DATA`` bounds it. Beyond the bound an
allocation fails, as if the machine had no more memory: the turn ends, its memory is given back, and the bound is lifted.
"""

import errno
import resource
from contextvars import ContextVar
from types import TracebackType
from typing import Self

from chainfed_ray.device.peak import PeakMemory, status
from chainfed_ray.errors import BudgetExceeded

# Address space that a turn maps and does not use: the stack of a thread is 8 MiB of it. What is in use is measured as well.
_UNUSED = 16 * 2**20
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "could not create",
    "can't start new thread",
)

_part: ContextVar[str] = ContextVar("part", default="getting ready")


def enter_phase(part: str) -> None:
    """Say what the turn is at; an error that ends it will name it."""
    _part.set(part)


class MemoryCap(PeakMemory):
    """``with MemoryCap(planned, cap): …``: measures the peak, and ends the block where it would exceed ``cap`` bytes.

    Raises:
        BudgetExceeded: from within the block when an allocation fails, or at its end if the measured peak is above ``cap``.
    """

    def __init__(self, planned: int, cap: int) -> None:
        self._planned, self._cap = planned, cap

    def __enter__(self) -> Self:
        super().__enter__()
        enter_phase("getting ready")
        self._before, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + self._cap + _UNUSED, hard))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (self._before, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        super().__exit__(kind, error, trace)
        if isinstance(error, Exception) and _is_out_of_memory(error):
            raise BudgetExceeded(self._planned, self._cap, None, _part.get()) from error
        if error is None and self.bytes is not None and self.bytes > self._cap:
            raise BudgetExceeded(self._planned, self._cap, self.bytes, _part.get())


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
