"""The memory of clients that train at once, of which a tenant may have a limit (``CHAINFED_CLIENT_MEMORY``)."""

from collections.abc import Mapping
from typing import Any

from chainfed_ray.cluster.storage import CLIENT_MEMORY
from chainfed_ray.errors import InvalidJob
from chainfed_ray.units import format_bytes, parse_bytes


def memory_at_once(document: Mapping[str, Any], slots: int) -> int:
    """The most bytes that clients of a job hold together: what those declare who train at once, of which there are ``slots``.

    Clients at sites are not counted: their memory is not the cluster's. A document that cannot be read needs nothing: its job
    fails as soon as it begins.
    """
    left, total = slots, 0
    try:
        found = [
            (parse_bytes(group["memory"]), int(group["count"]))
            for group in document["fleet"]["clients"]
            if group["site"] is None
        ]
    except (KeyError, TypeError, ValueError):
        return 0
    for memory, count in sorted(found, reverse=True):
        total += memory * min(count, left)
        left -= min(count, left)
    return total


def check_fits(document: Mapping[str, Any], slots: int, most: int | None) -> None:
    """Check that a job's clients may have their memory, if no other job has any.

    Raises:
        InvalidJob: they never may.
    """
    needed = memory_at_once(document, slots)
    if most is not None and needed > most:
        limit = f"at most {format_bytes(most)} of memory of the {slots} clients that train at once ({CLIENT_MEMORY})"
        raise InvalidJob.at("fleet.clients", format_bytes(needed), limit)


def why_it_waits(needed: int, held: int, most: int) -> str:
    """Why a job waits whose clients need so many bytes, while the tenant's other jobs hold some."""
    return (
        f"its clients need {format_bytes(needed)} at once, and those of the tenant's jobs at work hold "
        f"{format_bytes(held)} of the {format_bytes(most)} that {CLIENT_MEMORY} allows"
    )
