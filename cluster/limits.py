"""Limits the memory of a block of code: what needs more fails, and its process goes on (Linux)."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from chainfed_ray.device.peak import status


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
