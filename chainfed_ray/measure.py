"""The peak of a process's resident memory over a stretch of work (Linux)."""

import ctypes
import gc
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class PeakMemory:
    """``with PeakMemory() as peak: …`` then ``peak.bytes``: the most above what was resident at the start.

    Pages of files count too. ``bytes`` is None where the kernel does not let a process reset its high-water mark.
    """

    bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        _return_free_memory()
        try:
            _CLEAR.write_text("5")
        except OSError:
            self._start = None
        else:
            self._start = _read("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._start is not None:
            self.bytes = max(_read("VmHWM") - self._start, 0)


def _read(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _return_free_memory() -> None:
    """Let glibc give freed memory back, now and from now on: what one tensor leaves must not count against the next.

    Blocks of 64 KiB or more get pages of their own, which are returned when they are freed.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.mallopt(_M_MMAP_THRESHOLD, 64 * 1024)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)
