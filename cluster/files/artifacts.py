"""Lists what a job leaves for people to have, each file by a name, with its size and SHA-256. ::

    model/…            the served stack as a PEFT folder, with its model card
    last/…, best/…     the newest stack, and that with the least held-out loss; either may be the served one
    report/…           the result as text and JSON, and plots
    partition.json     which client got which rows, as digests (see records/manifest)

Stacks are listed once the job is over: before, each round replaces them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

STACKS = ("model", "last", "best")
REPORT = "report"
_MANIFEST = "partition.json"
_UNFINISHED = (".partial",)
_KNOWN_DIGESTS = 10_000  # of files, by their size and time
_READ_BYTES = 2**20


@dataclass(frozen=True)
class Artifact:
    """A file of a job, its ``bytes`` and their SHA-256 in hexadecimal digits."""

    name: str
    path: Path
    bytes: int
    sha256: str


def names_of(folder: Path, is_over: bool, finished: Mapping[str, Any] | None) -> dict[str, Path]:
    """The artifacts in a job's ``folder`` by name. ``finished`` is the record of its end, if it has succeeded."""
    found = {_MANIFEST: folder / _MANIFEST}
    if is_over:
        for name, stack in _stacks(folder, finished).items():
            found |= {f"{name}/{path.name}": path for path in _files(stack)}
    found |= {f"{REPORT}/{path.name}": path for path in _files(folder / REPORT)}
    return {name: path for name, path in sorted(found.items()) if path.is_file()}


def artifact(name: str, path: Path) -> Artifact:
    """The artifact at ``path``.

    Raises:
        FileNotFoundError: it is there no more.
    """
    state = path.stat()
    return Artifact(name, path, state.st_size, _digest(path, state.st_ino, state.st_size, state.st_mtime_ns))


def _stacks(folder: Path, finished: Mapping[str, Any] | None) -> dict[str, Path]:
    """The folder of each stack. One that is the served stack as well has no folder of its own."""
    found = {name: folder / name for name in STACKS if (folder / name).is_dir()}
    if finished is None or "model" not in found:
        return found
    served = finished["served"]
    found.setdefault(served, found["model"])
    if best := finished.get("best"):
        is_last = best["round"] == finished["rounds"] - 1
        if is_last and "last" in found:
            found.setdefault("best", found["last"])
    return found


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.suffix not in _UNFINISHED]
    except (FileNotFoundError, NotADirectoryError):
        return []


@lru_cache(_KNOWN_DIGESTS)
def _digest(path: Path, inode: int, size: int, changed: int) -> str:
    """The SHA-256 of a file, which is another one if it has another inode, size or time."""
    found = sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            found.update(block)
    return found.hexdigest()
