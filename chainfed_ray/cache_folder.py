"""Where what is made once and kept between runs has its folder: compiled libraries, converted models. How it is written."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from chainfed_ray.errors import InvalidSetting


def cache_folder(variable: str, inside: str = "", environment: Mapping[str, str] = os.environ) -> Path:
    """The folder that the environment ``variable`` names; by default ``chainfed/<inside>`` in the user's cache.

    Raises:
        InvalidSetting: the variable is not an absolute path.
    """
    if named := environment.get(variable):
        if not Path(named).is_absolute():
            raise InvalidSetting(variable, named, "an absolute path")
        return Path(named)
    cache = environment.get("XDG_CACHE_HOME") or f"{environment.get('HOME') or '/tmp'}/.cache"
    return Path(cache, "chainfed", inside)


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder called ``name`` among the converted models, which ``make`` has made.

    One process makes it at a time, and others wait for it. ``make`` is given the folder's path until it is complete, where
    something may be that a process left which was killed. Only what is on the disk is renamed, so no other folder is loaded.

    Raises:
        InvalidSetting: ``CHAINFED_MODELS`` is not an absolute path.
        OSError: the disk is full, or the folder cannot be made there.
    """
    folder = cache_folder("CHAINFED_MODELS", "models") / name
    if folder.is_dir():  # look before locking: where models are converted beforehand, the cache may be read-only
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # another process may have made it while this one waited
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            make(unfinished)
            for path in (*unfinished.iterdir(), unfinished):
                _onto_the_disk(path)
            unfinished.rename(folder)
            _onto_the_disk(folder.parent)
    return folder


@contextmanager
def writing() -> Iterator[None]:
    """Raise what a disk does not take as an ``OSError``: libraries in Rust have errors of their own for it."""
    try:
        yield
    except Exception as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
        raise


def shortened(name: str) -> str:
    """The beginning of a model's name, for that of a folder: at most 100 bytes, since file systems take 255 in all."""
    return name.encode(errors="ignore")[:100].decode(errors="ignore")


def _onto_the_disk(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
