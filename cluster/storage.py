"""Where the service keeps its data: a folder for commits and models, and a database of jobs; with the operator's settings.

Nothing is kept in Ray, because any process may be killed at any time, even Ray's head. Inside the folder ::

    chainfed.db                    the database, unless a URL names another
    service.log                    what the service on this machine and Ray print
    jobs/<job>/                    a job's commits (see commit_log), its log, and its report (see cluster/files)
    jobs/<job>/model/              the trained adapter stack that is served, in PEFT's format
    jobs/<job>/last/               the last stack, while the job trains, and later if another one is served
    jobs/<job>/best/               the stack with the least held-out loss, if it is neither the last nor the served one
    jobs/<job>/exit-<n>/           the stack of the early exit after n layers, where the job evaluated one
    uploads/<tenant>/              files that were sent to the service (see cluster/files)
    scratch/<job>/                 prefix caches, unless CHAINFED_SCRATCH names another folder; they may be deleted at any time

With a URL such as ``s3://bucket/prefix`` as CHAINFED_STORAGE, jobs and uploads are objects there (see cluster/objects).
Each machine has a folder, CHAINFED_CACHE, which may be lost, but for the database where that is SQLite's. In it ::

    scratch/<job>/commits/         a job's commits, where its coordinator works
    copies/<job>/<number>-<hash>/  a job's commits, for those who read them
    uploads/<tenant>/              the uploads that a job here has read
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal, TypeVar, cast, get_args
from urllib.parse import unquote

from chainfed_ray.cluster.objects.copies import Copies
from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.snapshots import Snapshots
from chainfed_ray.cluster.structured_logs import LOG
from chainfed_ray.errors import InvalidJob, InvalidSetting
from chainfed_ray.problem import some_of
from chainfed_ray.reading import EVERYTHING, ReadingRules
from chainfed_ray.records.secret import erase_secret
from chainfed_ray.units import parse_bytes

WithoutKeys = Literal["nobody", "loopback", "anyone"]
"""Who may ask a service as long as no key was made."""
QUEUED_JOBS, RUNNING_JOBS, REQUESTS = "CHAINFED_QUEUED_JOBS", "CHAINFED_RUNNING_JOBS", "CHAINFED_REQUESTS_PER_MINUTE"
CLIENT_MEMORY, GRACE = "CHAINFED_CLIENT_MEMORY", "CHAINFED_GRACE_SECONDS"
LEAST_REPLICAS = "CHAINFED_SERVING_LEAST_REPLICAS"
UPLOAD_BYTES, STORED_BYTES, UPLOADS = "CHAINFED_UPLOAD_BYTES", "CHAINFED_STORED_BYTES", "CHAINFED_UPLOADS"
ALIASES = "CHAINFED_ALIASES"
Default = TypeVar("Default", int, None)
_PROBE_BYTES = 65536
_FOLDER = "chainfed-data"  # unless the operator names another


@dataclass(frozen=True)
class Storage:
    """The folders and the database of one service."""

    root: Path
    database: str  # an SQLAlchemy URL
    scratch_root: Path
    url: str | None = None  # of the object store that has jobs and uploads; None if they are in ``root``

    @classmethod
    def at(
        cls,
        root: Path,
        database: str | None = None,
        scratch: Path | None = None,
        url: str | None = None,
        existing: bool = False,
    ) -> "Storage":
        """The storage in the folder ``root``, which is made if it does not exist, unless it must be an ``existing`` one.

        ``database`` is an SQLAlchemy URL; by default, an SQLite file in ``root``. ``scratch`` is a folder for prefix caches,
        which each machine may have for itself; by default, it is in ``root``. With the ``url`` of an object store, jobs and
        uploads are there.

        Raises:
            InvalidSetting: the folder is not there, cannot be made, or not be written to; or the URL is not one of a store.
            PackageMissing: what the store needs is not installed.
        """
        root = root.expanduser().absolute()
        setting = "CHAINFED_CACHE" if url else "CHAINFED_STORAGE"
        if existing and not url and not root.is_dir():  # with a URL, the folder has copies that are made anew
            raise InvalidSetting(setting, str(root), "a folder that is there")
        try:
            # Rows, models and logs of all tenants are there. A folder that is there already may be shared by its owner.
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise InvalidSetting(setting, str(root), f"a folder that can be made ({error})") from None
        if not os.access(root, os.W_OK | os.X_OK):
            raise InvalidSetting(setting, str(root), "a folder that may be written to")
        objects = ObjectStore.at(url) if url else None
        database = database or _sqlite_in(root)
        return cls(root, database, scratch or root / "scratch", objects.url if objects else None)

    @property
    def place(self) -> str:
        """Where jobs and uploads are kept: a folder, or the URL of an object store."""
        return self.url or str(self.root)

    @property
    def shown_place(self) -> str:
        """The place as it is told: a URL without its password."""
        return self.objects.shown if self.objects else self.place

    @property
    def objects(self) -> ObjectStore | None:
        """The object store that has jobs and uploads, if it is not a folder."""
        return ObjectStore(self.url) if self.url else None

    def job(self, job: str) -> Path:
        """The folder of a job's commits, for its coordinator. With an object store it is a working copy, and may be lost."""
        return self.scratch(job) / "commits" if self.url else self.root / "jobs" / job

    def committed(self, job: str, at_once: bool = False) -> Path:
        """The folder of what a job has committed, to read from. A copy from an object store may be a second old.

        Raises:
            OSError: the object store is away.
        """
        return _copies(self.url, self.root / "copies").folder(job, at_once) if self.url else self.job(job)

    def copies(self, job: str) -> Path:
        """The folder of this machine's copies of a job's commits, where those are in an object store."""
        return self.root / "copies" / job

    def erase_secret(self, job: str) -> None:
        """Delete the secret of a job's noise: whoever has it can subtract the noise.

        Raises:
            OSError: it cannot be deleted.
        """
        erase_secret(self.job(job))
        if self.objects:
            self.objects.delete([Snapshots(self.objects, job).secret])

    def remove(self, job: str) -> None:
        """Delete the files of a job, or what is in the place of its folder. They need not be there.

        Raises:
            OSError: a part could not be deleted.
        """
        for path in (self.job(job), *([self.copies(job)] if self.url else [])):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if self.objects:
            self.objects.delete_below(f"jobs/{job}")

    def model(self, job: str) -> Path:
        """The folder of a job's trained adapter stack."""
        return self.stack(job, None)

    def stack(self, job: str, index: int | None, moving: str | None = None, layers: int | None = None) -> Path:
        """The folder of the stack that a job had after round ``index``; of its model, without an index.

        With ``moving``, ``latest`` or ``best``, the newest or the best stack will do, if that of the round is kept no more.
        With ``layers`` it is that of the early exit after so many layers, of which one is kept.

        Raises:
            InvalidJob: that stack is kept no more.
        """
        folder = self.committed(job)
        if index is None or layers is not None:  # a copy may be from before it was made
            name = "model" if layers is None else f"exit-{layers}"
            return (folder if (folder / name).exists() else self.committed(job, at_once=True)) / name
        kept = _stacks_in(folder)
        if index not in kept and self.url:  # it may be newer than the copy
            kept = _stacks_in(self.committed(job, at_once=True))
        if index not in kept:
            found = [round_ for round_ in kept if round_ is not None]
            if moving and found:  # a better round than the newest has a folder of its own
                return kept[max(found) if moving == "latest" else min(found)]
            rounds = some_of(map(str, sorted(found)))
            raise InvalidJob.at("model", f"…@{index}", f"a round whose stack is kept, such as {rounds}")
        return kept[index]

    def uploads(self, tenant: str) -> Path:
        """The folder of the files that a tenant has sent."""
        return self.root / "uploads" / tenant

    def scratch(self, job: str) -> Path:
        """The folder of a job's prefix caches."""
        return self.scratch_root / job

    def clear_scratch(self, job: str) -> None:
        """Delete a job's prefix caches on this machine, to free the disk."""
        shutil.rmtree(self.scratch(job), ignore_errors=True)

    def check(self) -> None:
        """Write a little into each folder, and into the object store.

        Raises:
            OSError: one is full, may not be written to, or is gone.
        """
        folders = {self.root, self.scratch_root if self.scratch_root.exists() else self.root}
        for folder in sorted(folders):
            try:
                with TemporaryFile(dir=folder) as file:
                    file.write(bytes(_PROBE_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(folder)) from None
        if self.objects:
            self.objects.put("probe", b"written to see whether the store works\n")


@dataclass(frozen=True)
class Settings:
    """What the operator decides: where data is kept, and how much runs at once."""

    storage: Storage
    parallel_jobs: int = 1  # jobs that run at once
    client_slots: int = 4  # clients of a job that train at once
    serving_bytes: int | None = (
        None  # of models in a process that answers with them; None: half of its machine's memory
    )
    serving_replicas: int = 1  # processes that answer with models, at most; there is one until more requests wait
    least_serving_replicas: int = 1  # such processes, at least: with 0, the first request starts one, and waits for it
    allowed_hosts: tuple[str, ...] = ()  # names that the API answers to, besides addresses and localhost
    without_keys: WithoutKeys = "nobody"
    requests_per_minute: int | None = None  # of a tenant, to one process of the API
    queued_jobs: int | None = None  # of a tenant
    running_jobs: int | None = None  # of a tenant; others of its jobs wait
    reading: ReadingRules = EVERYTHING  # what jobs may read, besides what everybody may
    upload_bytes: int = 2**30  # of an upload, at most
    stored_bytes: int | None = None  # of a tenant: of its uploads, and of its jobs that are over
    most_uploads: int = 1000  # of a tenant
    grace_seconds: int = 100  # from the word to stop until processes are killed that have not ended
    json_logs: bool = False
    client_memory: int | None = None  # bytes of a tenant's clients that train at once
    most_aliases: int = 1000  # of a tenant

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ, existing: bool = False) -> "Settings":
        """Read the settings from the variables that docs/cli.md has in a table; ``environment`` gives them back.

        The folder of the storage is made if it does not exist, unless it must be an ``existing`` one.

        Raises:
            InvalidSetting: a variable has an invalid value.
            PackageMissing: the object store that is named needs a package that is not installed.
        """
        scratch, (root, url) = environment.get("CHAINFED_SCRATCH"), _place(environment)
        storage = Storage.at(
            root,
            environment.get("CHAINFED_DATABASE") or None,
            Path(scratch) if scratch else None,
            url,
            existing,
        )
        return cls(
            storage,
            _count(environment, "CHAINFED_PARALLEL_JOBS", 1),
            _count(environment, "CHAINFED_CLIENT_SLOTS", 2 * (os.cpu_count() or 1)),
            _bytes(environment, "CHAINFED_SERVING_MEMORY"),
            most := _count(environment, "CHAINFED_SERVING_REPLICAS", 1),
            _least_replicas(environment, most),
            tuple(environment.get("CHAINFED_ALLOWED_HOSTS", "").replace(",", " ").split()),
            _without_keys(environment),
            _count(environment, REQUESTS, None),
            _count(environment, QUEUED_JOBS, None),
            _count(environment, RUNNING_JOBS, None),
            ReadingRules(
                _folders(environment, "CHAINFED_DATA_ROOTS"),
                _folders(environment, "CHAINFED_MODEL_ROOTS"),
                tuple(environment.get("CHAINFED_HUB_ALLOW", "").replace(",", " ").split()) or None,
            ),
            _bytes(environment, UPLOAD_BYTES) or cls.upload_bytes,
            _bytes(environment, STORED_BYTES),
            _count(environment, UPLOADS, cls.most_uploads),
            _count(environment, GRACE, cls.grace_seconds),
            _json_logs(environment),
            _bytes(environment, CLIENT_MEMORY),
            _count(environment, ALIASES, cls.most_aliases),
        )

    def environment(self) -> dict[str, str]:
        """The variables from which ``from_environment`` makes the same settings in another process."""
        return {
            "CHAINFED_STORAGE": self.storage.place,
            "CHAINFED_CACHE": str(self.storage.root) if self.storage.url else "",
            "CHAINFED_DATABASE": self.storage.database,
            "CHAINFED_SCRATCH": str(self.storage.scratch_root),
            "CHAINFED_PARALLEL_JOBS": str(self.parallel_jobs),
            "CHAINFED_CLIENT_SLOTS": str(self.client_slots),
            "CHAINFED_SERVING_REPLICAS": str(self.serving_replicas),
            LEAST_REPLICAS: str(self.least_serving_replicas),
            "CHAINFED_SERVING_MEMORY": str(self.serving_bytes or ""),
            "CHAINFED_ALLOWED_HOSTS": ",".join(self.allowed_hosts),
            "CHAINFED_WITHOUT_KEYS": self.without_keys,
            REQUESTS: str(self.requests_per_minute or ""),
            QUEUED_JOBS: str(self.queued_jobs or ""),
            RUNNING_JOBS: str(self.running_jobs or ""),
            "CHAINFED_DATA_ROOTS": os.pathsep.join(map(str, self.reading.data_roots or ())),
            "CHAINFED_MODEL_ROOTS": os.pathsep.join(map(str, self.reading.model_roots or ())),
            "CHAINFED_HUB_ALLOW": ",".join(self.reading.hub or ()),
            UPLOAD_BYTES: str(self.upload_bytes),
            STORED_BYTES: str(self.stored_bytes or ""),
            CLIENT_MEMORY: str(self.client_memory or ""),
            UPLOADS: str(self.most_uploads),
            ALIASES: str(self.most_aliases),
            GRACE: str(self.grace_seconds),
            LOG: "json" if self.json_logs else "text",
        }


def _least_replicas(environment: Mapping[str, str], most: int) -> int:
    least = _count(environment, LEAST_REPLICAS, 1, least=0)
    if least > most:
        raise InvalidSetting(LEAST_REPLICAS, str(least), f"at most CHAINFED_SERVING_REPLICAS, {most}")
    return least


def _json_logs(environment: Mapping[str, str]) -> bool:
    text = environment.get(LOG) or "text"
    if text not in ("text", "json"):
        raise InvalidSetting(LOG, text, "text or json")
    return text == "json"


def _without_keys(environment: Mapping[str, str]) -> WithoutKeys:
    text = environment.get("CHAINFED_WITHOUT_KEYS") or "nobody"
    if text not in get_args(WithoutKeys):
        raise InvalidSetting("CHAINFED_WITHOUT_KEYS", text, f"one of {', '.join(get_args(WithoutKeys))}")
    return cast("WithoutKeys", text)


def _folders(environment: Mapping[str, str], name: str) -> tuple[Path, ...] | None:
    """The folders in a variable, with colons between them; None if there are none."""
    found = tuple(Path(text) for text in environment.get(name, "").split(os.pathsep) if text)
    if relative := [path for path in found if not path.is_absolute()]:
        raise InvalidSetting(name, str(relative[0]), "absolute paths of folders, with colons between them")
    return found or None


def _bytes(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    try:
        return parse_bytes(int(text) if text.isdecimal() else text)
    except ValueError:
        raise InvalidSetting(name, text, "a number of bytes such as 8GiB") from None


@lru_cache
def _copies(url: str, root: Path) -> Copies:
    return Copies(ObjectStore(url), root)


def _stacks_in(folder: Path) -> dict[int | None, Path]:
    """The stacks in a job's folder, by their rounds."""
    return {_round_of(folder / name): folder / name for name in ("best", "last", "model")}


def _round_of(stack: Path) -> int | None:
    """The round of the stack in a folder; None if there is no stack, or none that can be read."""
    for folder in (stack, stack.with_name(f"{stack.name}.before")):  # the latter while a new one takes its place
        with suppress(OSError, ValueError):
            own = folder / "chainfed.json"  # beside a LoRA, whose configuration is PEFT's
            found = json.loads((own if own.exists() else folder / "adapter_config.json").read_bytes()).get("round")
            return found if isinstance(found, int) else None
    return None


def database_url(environment: Mapping[str, str] = os.environ) -> str:
    """The database that the environment names. Nothing is made, neither it nor a folder."""
    return environment.get("CHAINFED_DATABASE") or _sqlite_in(_place(environment)[0].expanduser().absolute())


def _sqlite_in(root: Path) -> str:
    return f"sqlite:///{root / 'chainfed.db'}"


def _place(environment: Mapping[str, str]) -> tuple[Path, str | None]:
    """The folder of this machine that the environment names, and the URL of the object store, if jobs are in one."""
    place = environment.get("CHAINFED_STORAGE") or _FOLDER
    if place.startswith("file://"):  # in a URL, %20 is a space; in a path it is what it is
        return Path(unquote(place.removeprefix("file://"))), None
    url = place if "://" in place else None
    return Path((environment.get("CHAINFED_CACHE") or _FOLDER) if url else place), url


def _count(environment: Mapping[str, str], name: str, default: Default, least: int = 1) -> int | Default:
    text = environment.get(name)
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise InvalidSetting(name, text, f"a whole number, {least} or more")
    return int(text)
