"""What jobs may read on the machines of a service, and whose fault it is if that cannot be read.

There are folders of data, folders of models, and repositories of the hub.

A job names what it reads, and a service runs jobs of others. The process that prepares such a job holds the job's rules
meanwhile (``reading_by``). What is opened is looked at then, and not when the job was sent: what a path leads to may change.
"""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from chainfed_ray.errors import ChainFedError

OF_FULL_DISKS = (errno.EDQUOT, errno.ENOSPC)
"""What the operating system says of a disk that is full. It may come while a little can still be written."""
OF_ABSENT_DISKS = (
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENODEV, errno.ENOTCONN),
    *(errno.ENXIO, errno.ESHUTDOWN, errno.ETIMEDOUT),
)
"""The same of one that is gone, or behind a network whose other end does not answer."""
OF_DISKS = (
    *OF_FULL_DISKS,
    *OF_ABSENT_DISKS,
    *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EIO, errno.EROFS, errno.ESTALE),
)
"""All that it says of disks that do not work. They come back, so they are waited for. The rest is of what was named."""
_OF_RUST = re.compile(r"\(os error (\d+)\)$")  # how safetensors and tokenizers end the words of an error of the system
LFS_POINTER = b"version https://git-lfs"  # how a file begins that git-lfs has in place of one that it did not fetch
NF4 = "#nf4"  # ends the name of a base model whose matrices are read in NF4, as in ``hf:org/name#nf4``
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OPENED = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # without waiting for who writes into a pipe


class UploadedFile(NamedTuple):
    """A file that was sent to a service: what it was called, which says its form, and where its bytes are."""

    name: str
    path: Path


@dataclass(frozen=True)
class ReadingRules:
    """The folders in which data and models may be, and patterns of the hub's repositories, such as ``org/*``.

    None instead of them allows everything that the process can read. ``uploads`` are those that the job may read, by their ids.
    """

    data_roots: tuple[Path, ...] | None = None
    model_roots: tuple[Path, ...] | None = None
    hub: tuple[str, ...] | None = None
    uploads: Mapping[str, UploadedFile] = field(default_factory=dict)

    def closed(self) -> "ReadingRules":
        """These rules for those who may not read everything: where nothing is said, nothing is allowed."""
        return replace(self, data_roots=self.data_roots or (), model_roots=self.model_roots or (), hub=self.hub or ())


class NotAllowed(Exception):
    """The rules do not allow to read this. It says nothing about what is there, or whether anything is."""


class HubAway(OSError):
    """The hub does not answer, or has too much to do. It comes back, as disks do."""

    def __str__(self) -> str:
        return f"the hub does not answer ({self.strerror}): {self.filename}"


EVERYTHING = ReadingRules()
OWN_UPLOAD = "the id of an upload of yours that is complete, in a job for the service (`chainfed data list` shows them)"
"""What is expected in place of an upload that a job may not read, whether it is another tenant's or nobody's."""
_rules = EVERYTHING


@contextmanager
def reading_by(rules: ReadingRules) -> Iterator[None]:
    """Let this process read by ``rules`` while a block runs. A process prepares one job at a time."""
    global _rules
    before, _rules = _rules, rules
    try:
        yield
    finally:
        _rules = before


@contextmanager
def data_file(path: Path) -> Iterator[Path]:
    """The file at ``path``, under a name that leads to this file and no other while a block runs.

    Raises:
        NotAllowed: it is in no folder of data, or is no ordinary file.
        OSError: it cannot be read.
    """
    if _rules.data_roots is None:
        yield path
        return
    opened = os.open(within(path, _rules.data_roots), _OPENED)
    try:
        own = Path(f"/proc/self/fd/{opened}")
        within(own, _rules.data_roots)  # the file that was opened, whatever its name leads to by now
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise NotAllowed
        yield own
    finally:
        os.close(opened)


def data_path(path: Path) -> Path:
    """``path`` as it may be looked at: a file or folder of data, with no link in it.

    Raises:
        NotAllowed: it is in no folder of data, or is neither a file nor a folder.
    """
    return path if _rules.data_roots is None else _ordinary(within(path, _rules.data_roots))


def model_path(path: Path) -> Path:
    """The folder or file of a model, with no link in it. Each file of a folder is looked at as well.

    Raises:
        NotAllowed: it is in no folder of models, or leads out of them, or is neither a file nor a folder.
    """
    if _rules.model_roots is None:
        return path
    found = _ordinary(within(path, _rules.model_roots))
    if found.is_dir():
        for file in found.rglob("*"):
            _ordinary(within(file, _rules.model_roots))
    return found


def uploaded(upload: str) -> UploadedFile:
    """The file of an upload.

    Raises:
        NotAllowed: the job may read no upload with this id.
        OSError: its bytes are not there. It is complete, so that is no mistake of its owner's.
    """
    if upload not in _rules.uploads:
        raise NotAllowed
    file = _rules.uploads[upload]
    if not file.path.exists():
        raise OSError(errno.EIO, "the bytes of the upload are not there", str(file.path))
    return file


def check_repository(name: str) -> None:
    """Check that the repository ``name`` of the hub may be read.

    Raises:
        NotAllowed: no pattern allows it; or the name is that of a folder here, which libraries would read instead.
    """
    if _rules.hub is None:
        return
    allowed = _REPOSITORY.fullmatch(name) and any(fnmatchcase(name, pattern) for pattern in _rules.hub)
    if not allowed or Path(name).exists():
        raise NotAllowed


def within(path: Path, roots: tuple[Path, ...]) -> Path:
    """Where ``path`` leads to, if that is in one of ``roots``, which may be links themselves.

    Raises:
        NotAllowed: it is in none of them.
        OSError: it is in one that is empty or missing. That is how the folder looks on which a disk is not mounted.
    """
    found, root = _place(path, roots)
    if found == root or not found.exists():
        _check_filled(root)
    return found


def _place(path: Path, roots: tuple[Path, ...]) -> tuple[Path, Path]:
    """Where ``path`` leads to, and in which of ``roots`` that is: of several the deepest, which may be a disk of its own.

    Raises:
        NotAllowed: it is in none of them.
    """
    try:
        found = path.resolve()
        above = [root for root in (root.resolve() for root in roots) if found.is_relative_to(root)]
    except (OSError, RuntimeError, ValueError):  # links in a circle, a folder that may not be read, a null character
        above = []
    if not above:
        raise NotAllowed
    return found, max(above, key=lambda root: len(root.parts))


def _check_filled(root: Path) -> None:
    try:
        with os.scandir(root) as entries:
            filled = next(entries, None) is not None
    except NotADirectoryError:  # a root may be a file
        filled = True
    except FileNotFoundError:
        filled = False
    if not filled:
        raise OSError(errno.ENODEV, "nothing is there, as if its disk was not mounted", str(root))


def trouble_behind(error: BaseException) -> OSError | None:
    """The trouble of a disk or a connection that is behind ``error``; None if there is none."""
    behind: BaseException | None = error
    while behind:
        if isinstance(behind, OSError) and behind.errno in OF_DISKS:
            return behind
        # Other errors may quote what is in a user's file.
        of_rust = type(behind) is Exception or type(behind).__name__ == "SafetensorError"
        if of_rust and (found := _OF_RUST.search(str(behind))) and int(found[1]) in OF_DISKS:
            return OSError(int(found[1]), os.strerror(int(found[1])))
        behind = behind.__cause__ or behind.__context__
    return None


def _of_a_connection(error: Exception) -> OSError | None:
    """The trouble of a connection of which a library says no more than its kind."""
    if not isinstance(error, TimeoutError | ConnectionError):
        return None
    kind = errno.ETIMEDOUT if isinstance(error, TimeoutError) else errno.ENOTCONN
    return OSError(kind, str(error).partition("\n")[0] or os.strerror(kind))


def what_fails(trouble: OSError) -> str:
    """What does not work, in words."""
    if isinstance(trouble, HubAway):
        return "the hub"
    return f"the disk with {trouble.filename}" if trouble.filename else "a disk that the job reads"


@contextmanager
def reading_from(source: str, refusal: Callable[[Exception], ChainFedError]) -> Iterator[None]:
    """Tell apart what goes wrong while a block reads ``source``, which a user has named. Whatever reads for a job does it here.

    What was named may be anything, and so may what its reader raises: that is the user's to mend, and ``refusal`` says so. A
    disk or a connection that does not work is nobody's mistake. It is waited for, or the user is asked to come again.

    Raises:
        ChainFedError: the ``refusal``, or an error of ours that the block raised.
        OSError: a disk or a connection does not work.
        MemoryError: there is not enough memory.
        NotAllowed: the rules do not allow it.
    """
    try:
        yield
    except (ChainFedError, MemoryError, NotAllowed):
        raise
    except Exception as error:
        trouble = trouble_behind(error) or _of_a_connection(error)
        if trouble is None:
            raise refusal(error) from None
        if trouble.errno not in OF_FULL_DISKS:  # what is full is where something was written, and not what is read
            trouble.filename = source  # and not a name of ours for it, or where the service keeps it
        raise trouble from None


def try_to_read(path: Path, of_model: bool = False) -> None:
    """Read a little of a file, or of each file in a folder, if something is there, and the rules allow it.

    Raises:
        OSError: it cannot be read.
    """
    roots = _rules.model_roots if of_model else _rules.data_roots
    with suppress(NotAllowed):
        path = path if roots is None else within(path, roots)
        for file in path.iterdir() if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb", buffering=0) as opened:
                    opened.read(1)


def try_its_disk(path: Path, of_model: bool = False) -> None:
    """Look into the root of a file, and into the folder where it is, or which it is, if the rules allow it.

    Raises:
        OSError: one cannot be looked into. So it is no trouble of the file alone.
    """
    roots = _rules.model_roots if of_model else _rules.data_roots
    with suppress(NotAllowed):
        if roots is not None:
            path, root = _place(path, roots)
            _check_filled(root)
        folders = [path.parent]
        with suppress(OSError):  # one that does not say what it is may be the trouble of itself alone
            folders += [path] if path.is_dir() else []
        for folder in folders:
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(folder) as entries:
                next(entries, None)


def _ordinary(path: Path) -> Path:
    """``path``, if it is a file or a folder, or nothing."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise NotAllowed
    return path


def first_repeated(names: Iterable[str]) -> str | None:
    """The first of ``names`` that comes a second time; None if they all differ."""
    seen = set[str]()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
