"""What is left to do when a job ends: what is deleted, and how an error stands on the job's record.

The controller does this too. It imports no torch, so that the process of the controller starts at once and stays small.
"""

import logging
import os
from contextlib import suppress
from errno import ENOTCONN
from pathlib import Path
from typing import Any

from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.sites.mailbox import Mailbox
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import ChainFedError, CoordinatorLost
from chainfed_ray.records.first_cause import FirstCause

_DEATHS = 5  # after this many deaths of its coordinator without a finished round, a job fails

_log = logging.getLogger(__name__)


def clean_up(job: str, storage: Storage) -> OSError | None:
    """Remove the secret of a job's noise, its prefix caches and the orders of its sites.

    Returns what went wrong, if the job's folder is broken, or the object store is away.
    """
    storage.clear_scratch(job)
    mailbox = Mailbox(storage)
    try:
        storage.erase_secret(job)
        mailbox.forget(job)
    except OSError as error:
        _log.warning("job %s could not be cleaned up: %s", job, error)
        return error
    finally:
        mailbox.close()
    return None


def note_bytes(job: str, store: JobStore, storage: Storage) -> None:
    """Put on record how many bytes are kept of a job that is about to be over, or paused: its commits, stacks and log.

    Raises:
        OSError: the object store is away.
    """
    if storage.objects:
        count = sum(one.bytes for one in storage.objects.below(f"jobs/{job}"))
    else:
        count = sum(_size(Path(folder, name)) for folder, _, names in os.walk(storage.job(job)) for name in names)
    store.kept_bytes.note(job, count)


def pause(job: str, store: JobStore, storage: Storage) -> None:
    """Move a job that is to pause, of which nothing runs any more, to its pause."""
    try:
        note_bytes(job, store, storage)
    except OSError as error:  # the object store is away: the pause does not wait for it
        _log.warning("what is kept of job %s, which pauses, is not counted: %s", job, error)
    store.move(job, "paused", before=("pausing",))


def _size(path: Path) -> int:
    with suppress(OSError):  # it is there no more
        return path.lstat().st_size
    return 0


def fail(job: str, error: Exception, store: JobStore, storage: Storage) -> None:
    """Record that a job failed of an ``error`` outside of its turns, and clean it up. Its processes must have ended.

    Raises:
        OSError: the object store is away. The job has not failed yet, or its secret would stay there.
    """
    trouble = clean_up(job, storage)
    if trouble and trouble.errno == ENOTCONN:
        raise trouble
    note_bytes(job, store, storage)
    store.move(job, "failed", error={**described(error), "cause": FirstCause(message=str(error)).model_dump()})


def has_died_too_often(job: str, store: JobStore, storage: Storage) -> bool:
    """Count a death of the job's coordinator. True if there were ``_DEATHS`` since its last round: then the job has failed."""
    deaths = store.count_restart(job)
    if deaths < _DEATHS:
        return False
    fail(job, CoordinatorLost(job, deaths), store, storage)
    return True


def described(error: Exception) -> dict[str, Any]:
    """An error as it stands on a job's record."""
    if isinstance(error, ChainFedError):
        return error.document()
    return {"type": type(error).__name__, "message": str(error)}
