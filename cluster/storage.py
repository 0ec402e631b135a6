"""Where everything that lasts is kept: a folder for commits and models, and a database for jobs.

Neither lives in Ray: any process may be killed at any time, the head included. Inside the folder ::

    chainfed.db                    the database, unless a URL says otherwise
    jobs/<job>/                    a job's commits (see commit_log)
    jobs/<job>/model/              its finished stack, as PEFT keeps it
    jobs/<job>/best/               the stack that was best on held-out rows, if it is another; last/ where that one is served
    scratch/<job>/                 prefix caches, unless another folder is given for them: fast, and may be lost at any time
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chainfed_ray.errors import InvalidSetting


@dataclass(frozen=True)
class Storage:
    """One root folder and one database."""

    root: Path
    database: str
    scratch_root: Path

    @classmethod
    def at(cls, root: Path, database: str | None = None, scratch: Path | None = None) -> "Storage":
        """The storage in ``root``, which is made if need be; ``database`` is an SQLAlchemy URL, SQLite there by default.

        ``scratch`` is a folder of each machine's own, in ``root`` by default.

        Raises:
            InvalidSetting: the folder cannot be made or written to.
        """
        root = root.expanduser().absolute()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidSetting("CHAINFED_STORAGE", str(root), f"a folder that can be made ({error})") from None
        if not os.access(root, os.W_OK | os.X_OK):
            raise InvalidSetting("CHAINFED_STORAGE", str(root), "a folder that may be written to")
        return cls(root, database or f"sqlite:///{root / 'chainfed.db'}", scratch or root / "scratch")

    def job(self, job: str) -> Path:
        """The folder of a job's commits."""
        return self.root / "jobs" / job

    def model(self, job: str) -> Path:
        """The folder of a job's finished stack."""
        return self.job(job) / "model"

    def scratch(self, job: str) -> Path:
        """The folder of a job's prefix caches."""
        return self.scratch_root / job

    def clear_scratch(self, job: str) -> None:
        """Give the disk of a job's prefix caches back."""
        shutil.rmtree(self.scratch(job), ignore_errors=True)


@dataclass(frozen=True)
class Settings:
    """What an operator decides: where things are kept, and how much runs at once."""

    storage: Storage
    parallel_jobs: int = 1
    client_slots: int = 4

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """From ``CHAINFED_STORAGE``, ``…_DATABASE``, ``…_SCRATCH``, ``…_PARALLEL_JOBS`` and ``…_CLIENT_SLOTS``.

        Raises:
            InvalidSetting: one of them is wrong.
        """
        scratch = environment.get("CHAINFED_SCRATCH")
        storage = Storage.at(
            Path(environment.get("CHAINFED_STORAGE") or "chainfed-data"),
            environment.get("CHAINFED_DATABASE") or None,
            Path(scratch) if scratch else None,
        )
        return cls(
            storage,
            _count(environment, "CHAINFED_PARALLEL_JOBS", 1),
            _count(environment, "CHAINFED_CLIENT_SLOTS", 2 * (os.cpu_count() or 1)),
        )

    def environment(self) -> dict[str, str]:
        """The environment from which ``from_environment`` makes the same settings in another process."""
        return {
            "CHAINFED_STORAGE": str(self.storage.root),
            "CHAINFED_DATABASE": self.storage.database,
            "CHAINFED_SCRATCH": str(self.storage.scratch_root),
            "CHAINFED_PARALLEL_JOBS": str(self.parallel_jobs),
            "CHAINFED_CLIENT_SLOTS": str(self.client_slots),
        }


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise InvalidSetting(name, text, "a whole number, 1 or more")
    return int(text)
