"""Measures the peak of a process's resident memory during a block of code (Linux)."""

import ctypes
import gc
from pathlib import Path
from types import TracebackType
from typing import Self

# The environment of a process that takes turns; glibc and oneDNN read it as they are loaded. Blocks of 64 KiB or more get pages
# of their own, which are returned to the system when they are freed. All threads share one heap: a turn runs in another thread
# than the process's first. oneDNN caches a compiled product of half a MiB for each
# shape of matrices. Texts have many lengths, so this cache is kept small.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(64 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 1024),
    "MALLOC_ARENA_MAX": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
    "LRU_CACHE_CAPACITY": "8",
}

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class PeakMemory:
    """``with PeakMemory() as peak: …`` then ``peak.bytes``: the peak of resident memory above what was resident at the start.

    Resident pages of files count too. ``start`` is what was resident at the start, ``highest`` the peak itself; all are in
    bytes. ``bytes`` is None if the kernel does not let the process reset its high-water mark.
    """

    bytes: int | None = None
    highest: int | None = None
    start: int | None = None

    def __enter__(self) -> Self:
        gc.collect()
        _return_free_memory()
        try:
            _CLEAR.write_text("5")
        except OSError:
            self.start = None
        else:
            self.start = status("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.start is not None:
            self.highest = status("VmHWM")
            self.bytes = max(self.highest - self.start, 0)


def status(field: str) -> int:
    """The value in bytes of ``field``, such as VmRSS, in the kernel's status of this process."""
    return int(status_line(field).split()[0]) * 1024


def status_line(field: str) -> str:
    """The value of ``field`` in the kernel's status of this process, as text."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return line.partition(":")[2].strip()


def _return_free_memory() -> None:
    """Make glibc return freed memory to the system, now and later, even if the process was started without ``ENVIRONMENT``."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.mallopt(_M_MMAP_THRESHOLD, int(ENVIRONMENT["MALLOC_MMAP_THRESHOLD_"]))
        libc.mallopt(_M_TRIM_THRESHOLD, int(ENVIRONMENT["MALLOC_TRIM_THRESHOLD_"]))
        libc.malloc_trim(0)
