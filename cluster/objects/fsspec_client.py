"""Any filesystem of fsspec in the place of an object store, such as ``sftp://user@host/folder``.

Commits rest on one promise: of all who create a file of one name, the first succeeds and the others are refused. Some
filesystems look first and write then, and some write over what is there. So the promise is tried, by several at once, before
anything is created. A file that is created may be torn by a kill: whoever reads one knows its SHA-256, or its
length. One that is put is moved to its name once it is whole.

Credentials come from fsspec's own configuration, such as ``FSSPEC_SFTP_PASSWORD``.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from errno import EEXIST, ENOENT, ENOTCONN
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from secrets import token_hex
from threading import Lock, Thread
from time import time
from typing import Any, TypeVar

from chainfed_ray.cluster.objects.known_hosts import host_key_options
from chainfed_ray.cluster.objects.store_client import StoredObject

Found = TypeVar("Found")
_SECONDS, _BYTES_PER_SECOND = 60.0, 2**20  # until a call has failed, and for a longer one what a slow line carries
_TRIES = 2  # of a call, each with a connection of its own: the first one's may have been closed meanwhile
_ROUNDS, _AT_ONCE = 3, 4  # of creating one name, to see whether several succeed
_IDLE = 8  # connections that are kept
_PARTS = "parts"  # the folder of what is not whole yet, or only tried with: no list of objects has it
_LEFT_SECONDS = 86400.0  # since a file there was written: its process was killed
# Errors at the first try of a storage that waiting does not mend. Others mean that it is away.
_REFUSALS = (
    *(NotImplementedError, TypeError, ValueError, AttributeError, ImportError),
    *(PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError),
)
# The same, of packages that need not be installed: paramiko, smbprotocol, ftplib, google-auth.
_REFUSALS_BY_NAME = frozenset(
    {"AuthenticationException", "BadHostKeyException", "LogonFailure", "error_perm", "DefaultCredentialsError"}
)
_MODIFIED = ("mtime", "LastModified", "last_modified", "updated")  # when a file was written, as filesystems call it


class PromiseBroken(Exception):
    """The filesystem creates a file that is there. The message says what it did."""


class Unusable(Exception):
    """The filesystem can never be used as it is. The message says why."""


class FsspecClient:
    """See ``StoreClient``. Safe to use from several threads: each connection is asked one thing at a time.

    Raises:
        ValueError: fsspec knows no such filesystem.
        ImportError: it needs a package that is not installed.
    """

    def __init__(self, url: str, shown: str) -> None:
        from fsspec import get_filesystem_class

        get_filesystem_class(url.partition("://")[0])
        self._url, self._shown = url, shown
        self._idle, self._lock = list[_Connection](), Lock()
        self._keeps_promise = False
        # Names that this process has created, each with the SHA-256 of its bytes, which may not all be there.
        self._begun = set[tuple[str, str]]()

    def put(self, name: str, data: bytes | Path) -> None:
        """See ``StoreClient``."""
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        self._ask(name, lambda files, path: _put(files, path.removesuffix(name), path, data), size)

    def create(self, name: str, data: bytes) -> None:
        """See ``StoreClient``.

        Raises:
            PromiseBroken: the filesystem would have written over another file.
            Unusable: it cannot be written to.
        """
        self.probe()
        self._create(name, data)

    def probe(self) -> None:
        """Try the promise, if that has not been done. What is tried with is deleted.

        Raises:
            PromiseBroken: it is not kept.
            Unusable: the filesystem cannot be opened, or not be written to.
            OSError: the storage is away.
        """
        if self._keeps_promise:
            return
        try:
            self._ask("", lambda files, path: None)  # one connection, before there are several
            try:
                self._try_promise()
            finally:
                with suppress(OSError):  # if it is not deleted, it does no harm
                    self._clear_parts()
        except OSError as error:
            cause = error.__cause__ or error
            names = {kind.__name__ for kind in type(cause).__mro__}
            if isinstance(cause, _REFUSALS) or names & _REFUSALS_BY_NAME:
                raise Unusable(self._reason(cause)) from error
            raise
        self._keeps_promise = True

    def _clear_parts(self) -> None:
        """Delete what others have left in the folder of parts, and the folder if it is empty."""
        oldest = time() - _LEFT_SECONDS
        self.delete([one.name for one in self.below(_PARTS, None) if one.put_at < oldest])
        self._ask(_PARTS, _or(None, _remove_if_empty))

    def _try_promise(self) -> None:
        for _ in range(_ROUNDS):
            name = f"{_PARTS}/{token_hex(8)}"
            try:
                with ThreadPoolExecutor(_AT_ONCE) as threads:
                    created = list(threads.map(lambda mine: self._is_created(name, mine), range(_AT_ONCE)))  # noqa: B023
                if created.count(True) != 1:
                    raise PromiseBroken(f"of {_AT_ONCE} who created one file at once, {created.count(True)} succeeded")
                if self._is_created(name, _AT_ONCE):
                    raise PromiseBroken("a file that was there was created a second time")
                if self.get(name) != str(created.index(True)).encode():
                    raise PromiseBroken("a file that was created does not have the bytes of who succeeded")
            finally:
                with suppress(OSError):  # the error before says more
                    self.delete([name])

    def get(self, name: str) -> bytes:
        """See ``StoreClient``."""
        return self._ask(name, lambda files, path: bytes(files.cat_file(path)))

    def size(self, name: str) -> int:
        """See ``StoreClient``."""
        return self._ask(name, lambda files, path: int(files.info(path)["size"]))

    def part(self, name: str, start: int, length: int) -> bytes:
        """See ``StoreClient``."""
        return self._ask(name, lambda files, path: bytes(files.cat_file(path, start=start, end=start + length)), length)

    def below(self, prefix: str, after: str | None) -> Iterable[StoredObject]:
        """See ``StoreClient``."""

        def find(files: Any, path: str) -> list[StoredObject]:
            files.invalidate_cache()  # others write there as well
            top = path.strip("/").removesuffix(prefix.strip("/")).strip("/")
            found = files.find(path, detail=True).values()
            return [StoredObject(_inside(top, one["name"]), one["size"], _put_at(files, one)) for one in found]

        return [one for one in self._ask(prefix, _or(list[StoredObject](), find)) if not after or one.name > after]

    def inside(self, prefix: str) -> tuple[Iterable[str], Iterable[str]]:
        """See ``StoreClient``."""

        def look(files: Any, path: str) -> list[tuple[str, str]]:
            files.invalidate_cache()
            return [(one["type"], one["name"].rstrip("/").rpartition("/")[2]) for one in files.ls(path, detail=True)]

        found = self._ask(prefix, _or(list[tuple[str, str]](), look))
        folders = [name for kind, name in found if kind == "directory"]
        return folders, [name for kind, name in found if kind != "directory"]

    def delete(self, names: list[str]) -> None:
        """See ``StoreClient``."""
        for name in names:
            self._ask(name, _or(None, lambda files, path: files.rm_file(path)))

    def delete_below(self, prefix: str) -> None:
        """See ``StoreClient``."""
        self._ask(prefix, _or(None, lambda files, path: files.rm(path, recursive=True)))

    def _is_created(self, name: str, mine: int) -> bool:
        try:
            self._create(name, str(mine).encode())
        except FileExistsError:
            return self.get(name) == str(mine).encode()  # a first try, whose answer was lost
        return True

    def _create(self, name: str, data: bytes) -> None:
        mine = name, sha256(data).hexdigest()

        def create(files: Any, path: str) -> None:
            try:
                _create(files, path, data, begun=lambda: self._begun.add(mine))
            except OSError as error:
                is_there = isinstance(_as_python_names_it(error), FileExistsError)
                if not is_there or mine not in self._begun or not data.startswith(there := bytes(files.cat_file(path))):
                    raise
                # A first try has created the file for these bytes, and its connection broke. So nobody else has: what is
                # there is the beginning of them, and may be written again. A file that only looks like that, as an empty
                # one does, may be of somebody who has just created it, and is left alone.
                if len(there) < len(data):
                    _put(files, path.removesuffix(name), path, data)
            self._begun.discard(mine)

        self._ask(name, _in_its_folder(create), len(data))

    def _ask(self, name: str, call: "Callable[[Any, str], Found]", size: int = 0) -> Found:
        """What ``call`` returns for the filesystem and the path of ``name`` there."""
        error: Exception | None = None
        for _ in range(_TRIES):
            connection = self._take()
            try:
                found = connection.ask(name, call, _SECONDS + size / _BYTES_PER_SECOND)
            except (FileExistsError, FileNotFoundError):
                self._give_back(connection)
                raise
            except Exception as caught:  # of a filesystem that we do not know
                connection.end()
                error = caught
            else:
                self._give_back(connection)
                return found
        raise OSError(ENOTCONN, f"the storage does not answer ({self._reason(error)})", self._shown) from error

    def _reason(self, error: BaseException | None) -> str:
        """An error in a line, without the password that the URL may have."""
        return str(error).partition("\n")[0].replace(self._url, self._shown) or type(error).__name__

    def _take(self) -> "_Connection":
        with self._lock:
            return self._idle.pop() if self._idle else _Connection(self._url)

    def _give_back(self, connection: "_Connection") -> None:
        with self._lock:
            if len(self._idle) < _IDLE:
                return self._idle.append(connection)
        connection.end()


class _Connection:
    """A filesystem, and the thread that alone uses it. A call that never returns is left to that thread."""

    def __init__(self, url: str) -> None:
        self._url, self._calls = url, SimpleQueue[Callable[[], None] | None]()
        self._files: tuple[Any, str] | None = None
        Thread(target=self._work, name="storage", daemon=True).start()

    def ask(self, name: str, call: Callable[[Any, str], Found], seconds: float) -> Found:
        """What ``call`` returns.

        Raises:
            TimeoutError: it has not returned after so many seconds.
        """
        answer = Future[Found]()

        def work() -> None:
            try:
                files, root = self._opened()
                answer.set_result(call(files, f"{root.rstrip('/')}/{name}" if name else root))
            except BaseException as error:
                answer.set_exception(_as_python_names_it(error))

        self._calls.put(work)
        return answer.result(seconds)

    def end(self) -> None:
        """End the thread, and with it the connection."""
        self._calls.put(None)

    def _opened(self) -> tuple[Any, str]:
        if self._files is None:
            from fsspec.core import url_to_fs

            how = host_key_options(self._url.partition("://")[0])
            try:
                self._files = url_to_fs(self._url, skip_instance_cache=True, **how)
            except (FileNotFoundError, FileExistsError) as error:  # not of the object that is asked for
                raise ValueError(f"it cannot be opened: {error}") from error
        return self._files

    def _work(self) -> None:
        while call := self._calls.get():
            call()


def _has_objects(files: Any) -> bool:
    """Whether a filesystem puts a file as a whole, as object stores do; others open it, and write."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    return isinstance(files, AsyncFileSystem) or type(files).pipe_file is not AbstractFileSystem.pipe_file


def _put(files: Any, root: str, path: str, data: bytes | Path) -> None:
    """Put a file below the folder ``root``: as a whole, or not at all, unless the filesystem cannot move files."""
    from fsspec import AbstractFileSystem

    def write(files: Any, path: str) -> None:
        if isinstance(data, Path):
            files.put_file(str(data), path)
        else:
            files.pipe_file(path, data)

    if _has_objects(files) or type(files).mv is AbstractFileSystem.mv:  # that one copies
        return _in_its_folder(write)(files, path)
    part = f"{root.rstrip('/')}/{_PARTS}/{token_hex(8)}"
    try:
        _in_its_folder(write)(files, part)
        _in_its_folder(lambda files, path: _move(files, part, path))(files, path)
    except BaseException:
        with suppress(Exception):  # the connection may be broken: it is deleted a day later
            files.rm_file(part)
        raise


def _move(files: Any, part: str, path: str) -> None:
    try:
        files.mv(part, path)
    except OSError:
        if not (files.exists(path) and files.exists(part)):
            raise
        files.rm_file(path)  # this one, as SMB, moves over nothing. The file is gone for a moment, and never half
        files.mv(part, path)


def _remove_if_empty(files: Any, folder: str) -> None:
    if not _has_objects(files) and not files.ls(folder):
        with suppress(OSError):  # another process has just put something there
            files.rmdir(folder)


def _create(files: Any, path: str, data: bytes, begun: Callable[[], object]) -> None:
    """Create a file, in the way of the filesystem: objects have a condition, and files a mode.

    ``begun`` is called when there is a file, without its bytes.
    """
    if _has_objects(files):
        files.pipe_file(path, data, mode="create")
        return
    try:
        file = files.open(path, "xb" if "sftp" not in files.protocol else "wxb")  # in paramiko, x alone does not write
    except OSError as error:
        if not isinstance(_as_python_names_it(error), (FileExistsError, FileNotFoundError)) and files.exists(path):
            raise FileExistsError(path) from error  # SFTP says no more than that it failed
        raise
    begun()
    with file:
        file.write(data)


def _in_its_folder(write: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    """``write``, with the folder of the file made if it is missing. Others may make it at the same time."""

    def written(files: Any, path: str) -> None:
        folder = path.rpartition("/")[0]
        for _ in range(_AT_ONCE):
            try:
                return write(files, path)
            except Exception as error:
                if not isinstance(_as_python_names_it(error), FileNotFoundError):
                    raise
            try:
                files.makedirs(folder, exist_ok=True)
            except OSError:
                if not files.exists(folder):
                    raise
        write(files, path)

    return written


def _or(otherwise: Found, look: Callable[[Any, str], Found]) -> Callable[[Any, str], Found]:
    """``look``, or ``otherwise`` where there is nothing to look at."""

    def looked(files: Any, path: str) -> Found:
        try:
            return look(files, path)
        except OSError as error:
            if isinstance(_as_python_names_it(error), FileNotFoundError):
                return otherwise
            raise

    return looked


def _as_python_names_it(error: BaseException) -> BaseException:
    """An error by its class, also of a filesystem that says it by the number alone."""
    named = {ENOENT: FileNotFoundError, EEXIST: FileExistsError}.get(getattr(error, "errno", None) or 0)
    return named(*error.args) if named and isinstance(error, OSError) and not isinstance(error, named) else error


def _inside(top: str, name: str) -> str:
    """The name of a file below the folder ``top``."""
    return name.strip("/").removeprefix(top).strip("/")


def _put_at(files: Any, described: dict[str, Any]) -> float:
    """When a file was written, in seconds since 1970; now, where the filesystem does not know."""
    found = next((described[name] for name in _MODIFIED if name in described), None)
    if found is None:
        try:
            found = files.modified(described["name"])
        except NotImplementedError:
            return time()
    return float(found) if isinstance(found, (int, float)) else float(found.timestamp())
