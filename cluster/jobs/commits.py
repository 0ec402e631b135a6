"""A job's commits where they count: in the job's folder or, with an object store, there. What is away is waited for."""

import logging
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from time import sleep

from chainfed_ray.activity import Activity
from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.objects.working_copy import WorkingCopy
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.reading import OF_DISKS
from chainfed_ray.records.commit_log import CommitLog

_RETRY_SECONDS = 5.0  # until the storage is asked again

_log = logging.getLogger(__name__)


class Commits:
    """The commits of a job, for the one process that runs it."""

    def __init__(self, job: str, store: JobStore, storage: Storage) -> None:
        self._job, self._store, self._folder = job, store, storage.job(job)
        self._copy = WorkingCopy(storage.objects, job, self._folder) if storage.objects else None
        self._begun, self._rounds = False, 0

    def begin(self) -> None:
        """Bring the folder to what was committed last. If that is damaged, an event says so, and the commit before is used.

        Raises:
            CorruptCommit: no commit can be used.
            OSError: the storage is away.
        """
        damaged = self._copy.begin() if self._copy else []
        log = CommitLog(self._folder)
        if found := log.set_aside_damaged():
            damaged = [*damaged, found]
        self._begun = True
        for what in damaged:
            _log.error("job %s: a commit is damaged: %s; the one before is used", self._job, what)
            key = f"damaged-{sha256(what.encode()).hexdigest()[:16]}"
            self._store.publish(self._job, key, "damaged", {"reason": f"{what}; the commit before is used"})
        self._rounds = len(list((self._folder / "rounds").glob("*.json")))

    def keep(self, round_: int | None = None, is_last: bool = False) -> None:
        """Make what the job's folder has count: a start, the round with the index ``round_``, or the end.

        A round that counts already is passed over. It returns once the store has it, however long that is away.

        Raises:
            CommitConflict: another process has committed meanwhile.
        """
        if self._copy is None or not self._begun or (round_ is not None and round_ < self._rounds):
            return
        copy = self._copy
        wait_for(lambda: copy.commit(is_last), self._job, self._store)


def wait_for(work: Callable[[], None], job: str, store: JobStore) -> None:
    """Do ``work``. Where a disk or the object store is in its way, do it again, until it is done."""
    while True:
        try:
            return work()
        except OSError as error:
            if error.errno not in OF_DISKS:
                raise
            _log.warning("job %s waits for its storage: %s", job, error)
            with suppress(*NO_ANSWER):
                store.note_activity(job, Activity(what="waiting for the storage", note=str(error)))
            sleep(_RETRY_SECONDS)
