"""The states of a job, and which of them may follow which."""

from collections.abc import Mapping
from typing import Literal

Status = Literal[
    "queued", "validating", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled"
]
STATES_BEFORE: Mapping[Status, tuple[Status, ...]] = {
    "queued": ("paused", "failed", "cancelled"),  # resumed or tried again, it waits for a free place
    "validating": ("queued", "pausing"),
    "running": ("queued", "validating", "pausing"),  # what has been validated before goes on without that
    "pausing": ("validating", "running"),
    "paused": ("queued", "pausing"),
    "cancelling": ("queued", "validating", "running", "pausing", "paused"),
    "cancelled": ("queued", "cancelling"),
    "succeeded": ("running", "pausing"),
    "failed": ("validating", "running", "pausing"),
}
"""Which states a job may be in before each."""
FINISHED: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})
"""The states of a job that is over."""
AT_WORK: tuple[Status, ...] = ("validating", "running", "pausing")
"""The states of a job that has a coordinator, unless that is to end."""
