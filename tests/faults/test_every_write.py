"""Promise: whichever write of a job fails, on a disk, in the database or in an object store, it waits and ends as if none had.

A job is run again and again. Each time a trouble begins at another of its writes, from the first to the last, and lasts until
the job waits for it. The seed says with which write the sweep begins; a sweep tries some forty, evenly over the whole job.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from errno import ENOSPC, ENOTCONN, EROFS
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError

from chainfed_ray.cluster.jobs import commits
from chainfed_ray.cluster.jobs import run as running
from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.federation.run import in_this_process
from chainfed_ray.spec.parse import parse_job

SEED, TRIES = int(os.environ.get("CHAINFED_FAULTS_SEED", "0")), 40
pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(1800)]


class Trouble:
    """Begins when so many writes were made before, and lasts until somebody waits. None begins at -1."""

    def __init__(self, at: int) -> None:
        self.at, self.writes, self.lasts, self.waits = at, 0, False, 0

    def write(self) -> bool:
        """Count a write; True if it fails."""
        self.lasts = self.lasts or self.writes == self.at
        self.writes += 1
        return self.lasts

    def wait(self, _seconds: float) -> None:
        """In place of ``sleep``."""
        self.waits, self.lasts = self.waits + 1, False


Befall = Callable[[Trouble, Storage], AbstractContextManager[None]]
_disk: list[tuple[Trouble, str, int]] = []  # the trouble of the disk there is now, the folder, and the error


def _audited(name: str, arguments: tuple[Any, ...]) -> None:
    """Fail what writes into the folder. Python's audit hooks stay for ever, so this one looks for a trouble first."""
    if not _disk or name not in ("open", "os.rename", "os.mkdir", "os.link"):
        return
    (trouble, folder, error), (path, *others) = _disk[0], arguments
    if not isinstance(path, str) or not path.startswith(folder) or ".db" in path:
        return
    if (name != "open" or others[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and trouble.write():
        raise OSError(error, os.strerror(error), path)


sys.addaudithook(_audited)


def disk(error: int) -> Befall:
    """A disk that is full, or that can be read only."""

    @contextmanager
    def befall(trouble: Trouble, storage: Storage) -> Iterator[None]:
        _disk.append((trouble, str(storage.root), error))
        try:
            yield
        finally:
            _disk.clear()

    return befall


@contextmanager
def database(trouble: Trouble, storage: Storage) -> Iterator[None]:
    """A database that does not answer."""

    def execute(*_: Any) -> None:
        if trouble.write():
            raise OperationalError("a statement", {}, ConnectionError("no answer"))

    names = ("before_cursor_execute", "commit")
    for name in names:
        event.listen(Engine, name, execute)
    try:
        yield
    finally:
        for name in names:
            event.remove(Engine, name, execute)


@contextmanager
def object_store(trouble: Trouble, storage: Storage) -> Iterator[None]:
    """An object store that does not answer."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("put", "create", "get", "download", "below", "delete"):
            patch.setattr(ObjectStore, name, _away(getattr(ObjectStore, name), trouble))
        yield


def _away(method: Callable[..., Any], trouble: Trouble) -> Callable[..., Any]:
    def asked(*arguments: Any, **options: Any) -> Any:
        if trouble.write():
            raise OSError(ENOTCONN, "the store does not answer")
        return method(*arguments, **options)

    return asked


@pytest.mark.parametrize(
    "befall",
    [disk(ENOSPC), disk(EROFS), database, object_store],
    ids=["a full disk", "a read-only disk", "the database", "the object store"],
)
def test_a_trouble_at_any_write_is_waited_for(
    befall: Befall,
    document: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document["rounds"] |= {"total": 2, "clients": 2, "quorum": 2}
    document["fleet"]["clients"][0]["count"] = 2
    url = request.getfixturevalue("s3").url("writes") if befall is object_store else None

    def ended(at: int) -> tuple[int, int, list[str], bytes]:
        """How many writes a job made and how often it waited, the events of the job, and its weights."""
        storage, trouble = Storage.at(tmp_path / f"storage{at}", url=url and f"{url}{at}"), Trouble(at)
        for module in (running, commits):
            monkeypatch.setattr(module, "sleep", trouble.wait)
        store = JobStore(storage.database)
        job = store.submit(parse_job(document)).id
        store.move(job, "validating")
        with befall(trouble, storage):
            run_queued_job(job, storage, in_this_process)
        kinds = [each.kind for each in store.events(job)]
        store.close()
        return trouble.writes, trouble.waits, kinds, (storage.model(job) / "adapter_model.safetensors").read_bytes()

    writes, waits, kinds, weights = ended(-1)
    assert (waits, kinds[-1]) == (0, "succeeded")
    for at in range(SEED % 3, writes, max(writes // TRIES, 1)):
        assert ended(at)[2:] == (kinds, weights), f"write {at} of {writes}"
