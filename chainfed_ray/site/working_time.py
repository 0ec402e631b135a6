"""How long the turns of each job have taken at this site, in a folder that outlives the process."""

import logging
import math
import os
from pathlib import Path
from threading import Lock
from time import monotonic

from chainfed_ray.errors import InvalidSetting

_KEPT_SECONDS = 10.0  # who is killed loses at most so much of what was counted
_log = logging.getLogger("chainfed")


class WorkingTime:
    """The seconds of each job, in one small file a job in ``folder``. Safe to use from several threads.

    Nothing that the service says deletes a file: it could begin anew otherwise.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, Lock()
        self._seconds: dict[str, float] = {}
        self._kept_at: dict[str, float] = {}

    def of(self, job: str) -> float:
        """The seconds that turns of ``job`` have taken.

        Raises:
            InvalidSetting: its file has something else.
        """
        with self._lock:
            return self._of(job)

    def add(self, job: str, seconds: float, is_over: bool = False) -> float:
        """Count more ``seconds`` of a turn of ``job``, which ``is_over``, or goes on. Gives how many there are."""
        with self._lock:
            self._seconds[job] = self._of(job) + seconds
            if is_over or monotonic() - self._kept_at.get(job, -math.inf) >= _KEPT_SECONDS:
                self._kept_at[job] = monotonic()
                try:
                    self._keep(job)
                except OSError as error:  # this process counts on, and tries again
                    _log.warning("the time of job %s cannot be kept: %s", job, error)
            return self._seconds[job]

    def _of(self, job: str) -> float:
        if job not in self._seconds:
            path = self._folder / job
            try:
                self._seconds[job] = float(path.read_text()) if path.exists() else 0.0
            except ValueError:
                expected = f"a folder whose file {path} has a number of seconds; without it the job begins with none"
                raise InvalidSetting("--cache", str(self._folder.parent), expected) from None
        return self._seconds[job]

    def _keep(self, job: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{job}.partial"
        with partial.open("w") as file:
            file.write(f"{self._seconds[job]:.3f}\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._folder / job)
