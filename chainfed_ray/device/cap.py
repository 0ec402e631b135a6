"""Caps the memory that a client's turn may use: a turn that needs more is stopped by an error, and its process goes on.

Linux counts the private memory that a process may write to (``VmData``), and ``RLIMIT_DATA`` limits it. Above the limit an
allocation fails, as if the machine had no memory left. The turn then ends, its memory is freed, and the limit is lifted.
"""

import errno
import resource
from contextvars import ContextVar
from types import TracebackType
from typing import Self

from chainfed_ray.device.peak import PeakMemory, status
from chainfed_ray.errors import BudgetExceeded

# Room for address space that a turn maps and does not use, such as 8 MiB for a thread's stack. MemoryCap also checks the peak.
_UNUSED = 16 * 2**20
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")
# What oneDNN and Python's threads say without a cause. It is a lack of memory only if the block held much of its cap.
_PERHAPS_OUT_OF_MEMORY = ("could not create", "can't start new thread")

_phase: ContextVar[str] = ContextVar("phase", default="getting ready")


def enter_phase(phase: str) -> None:
    """Set the name of the turn's current phase, such as ``training``. An error that ends the turn names it."""
    _phase.set(phase)


class MemoryCap(PeakMemory):
    """``with MemoryCap(planned, cap): …``: measures the peak, and stops the block if it needs more than ``cap`` bytes.

    Raises:
        BudgetExceeded: an allocation in the block failed, or at the block's end the measured peak is above ``cap``.
    """

    def __init__(self, planned: int, cap: int) -> None:
        self._planned, self._cap = planned, cap

    def __enter__(self) -> Self:
        super().__enter__()
        enter_phase("getting ready")
        self._before, hard = resource.getrlimit(resource.RLIMIT_DATA)
        self._data = status("VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (self._data + self._cap + _UNUSED, hard))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (self._before, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        super().__exit__(kind, error, trace)
        if isinstance(error, Exception) and self._is_out_of_memory(error):
            raise BudgetExceeded(self._planned, self._cap, None, _phase.get()) from error
        if error is None and self.bytes is not None and self.bytes > self._cap:
            raise BudgetExceeded(self._planned, self._cap, self.bytes, _phase.get())

    def _is_out_of_memory(self, error: Exception) -> bool:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if not isinstance(error, RuntimeError):
            return False
        # What the block held is still there: the error's traceback refers to it.
        held = max(status("VmData") - self._data, self.bytes or 0)
        perhaps = _PERHAPS_OUT_OF_MEMORY if held >= self._cap // 2 else ()
        return any(words in str(error) for words in _OUT_OF_MEMORY + perhaps)
