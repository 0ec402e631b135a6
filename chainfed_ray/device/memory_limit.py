"""How much memory there is, and a limit for a block of code: what needs more fails, and its process goes on (Linux)."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from chainfed_ray.device.peak import status

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def machine_bytes() -> int:
    """The memory of this machine, or what a container of it may use."""
    total = psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # there is no such file, or it says "max"
        total = min(total, int(_CGROUP_LIMIT.read_text()))
    return total


@contextmanager
def memory_limit(count: int) -> Iterator[None]:
    """Limit what the block may allocate to ``count`` bytes more than the process has now.

    Raises:
        MemoryError: an allocation of Python's failed. Libraries raise errors of their own.
    """
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, resource.getrlimit(resource.RLIMIT_DATA)[1]))
