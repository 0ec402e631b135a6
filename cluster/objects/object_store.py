"""Where the service keeps objects: whole, by name. An object store such as S3, or a filesystem that keeps what it promises.

A store that is away raises an ``OSError`` as a disk does that is away (``ENOTCONN``), so whoever waits for a disk waits for
the store as well.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from urllib.parse import SplitResult, urlsplit

from chainfed_ray.cluster.objects.fsspec_client import FsspecClient, PromiseBroken, Unusable
from chainfed_ray.cluster.objects.obstore_client import SCHEMES, ObstoreClient
from chainfed_ray.cluster.objects.store_client import StoreClient, StoredObject
from chainfed_ray.errors import InvalidSetting, PackageMissing

_SETTING = "CHAINFED_STORAGE"
_EXPECTED = (
    f"a folder, or the URL of a store: {', '.join(SCHEMES)}, or any other scheme that fsspec knows, such as sftp"
)
_PART_BYTES = 8 * 2**20  # are asked for at once
_NEVER = ("memory", "http", "https", "data")  # other processes do not see what is put there, or nothing can be put
_UNREADABLE = (
    "a URL that can be read: leave a password with any of [ ] / ? # @ out, and give it as FSSPEC_SFTP_PASSWORD"
)


@dataclass(frozen=True)
class ObjectStore:
    """The objects below ``url``, such as ``s3://bucket/prefix``.

    Every method raises ``OSError`` with ``ENOTCONN`` if the store does not answer, or answers with an error of its own.
    """

    url: str

    @classmethod
    def at(cls, url: str) -> "ObjectStore":
        """The store at ``url``. An object store is asked nothing yet; another filesystem is opened, and its promise is tried.

        One that is away is taken as it is: it is waited for, and asked before anything is created.

        Raises:
            InvalidSetting: it is not the URL of a store that can be used.
            PackageMissing: obstore is not installed.
        """
        scheme, _, rest = url.partition("://")
        if _parts(url) is None:
            raise InvalidSetting(_SETTING, without_password(url), _UNREADABLE)
        if "::" in url or scheme in _NEVER or not rest.strip("/"):
            raise InvalidSetting(_SETTING, without_password(url), _EXPECTED)
        store = cls(url.rstrip("/"))
        try:
            client = _client(store.url, os.getpid())
        except ImportError as error:
            if scheme in SCHEMES:
                raise PackageMissing(f"{_SETTING}={store.shown}", "obstore", "s3") from None
            raise InvalidSetting(_SETTING, store.shown, f"a storage whose package is installed ({error})") from None
        except Exception as error:  # of obstore: what the environment must say and does not; of fsspec: no such scheme
            raise InvalidSetting(_SETTING, store.shown, f"{_EXPECTED} ({_first_line(error)})") from None
        if isinstance(client, FsspecClient):
            with suppress(OSError), store._kept():
                client.probe()
        return store

    @property
    def shown(self) -> str:
        """The URL as it is told, without a password."""
        return without_password(self.url)

    def put(self, name: str, data: bytes | Path) -> None:
        """Put an object, in place of the one that there may be."""
        self._client.put(name, data)

    def create(self, name: str, data: bytes) -> None:
        """Put an object if there is none of this name: of all who try at the same time, one succeeds.

        Raises:
            FileExistsError: there is another one.
        """
        try:
            with self._kept():
                self._client.create(name, data)
        except FileExistsError:
            # The answer to a first try may be lost, and the second one then finds what the first has put.
            if self.get(name) != data:
                raise

    def get(self, name: str) -> bytes:
        """The bytes of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._client.get(name)

    def parts(self, name: str, size: int | None = None) -> Iterator[bytes]:
        """The bytes of an object, or its first ``size`` ones, a part at a time; fewer if it has fewer.

        Raises:
            FileNotFoundError: there is none.
        """
        there = self._client.size(name)
        size = there if size is None else min(size, there)
        for start in range(0, size, _PART_BYTES):
            yield self._client.part(name, start, min(_PART_BYTES, size - start))

    def download(self, name: str, path: Path, size: int | None = None) -> str:
        """Write an object, or its first ``size`` bytes, to the file ``path``. Returns the SHA-256 of what was written.

        Raises:
            FileNotFoundError: there is none.
        """
        found = sha256()
        with path.open("wb") as file:
            for part in self.parts(name, size):
                found.update(part)
                file.write(part)
        return found.hexdigest()

    def download_to(self, name: str, path: Path, digest: str | None = None, size: int | None = None) -> bool:
        """Write an object, or its first ``size`` bytes, to the file ``path``: as a whole, or not at all.

        With a ``digest``, nothing is written if they have another SHA-256, and this is False.

        Raises:
            FileNotFoundError: there is none.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{token_hex(4)}.partial")
        try:
            if self.download(name, partial, size) != digest and digest is not None:
                return False
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return True

    def below(self, prefix: str, after: str | None = None) -> list[StoredObject]:
        """The objects below the folder ``prefix`` by name; only those behind the name ``after``."""
        return sorted(self._client.below(prefix, after))

    def folders(self, prefix: str) -> list[str]:
        """The names of the folders in the folder ``prefix``."""
        return sorted(self._client.inside(prefix)[0])

    def files(self, prefix: str) -> list[str]:
        """The names of the objects in the folder ``prefix`` itself."""
        return sorted(self._client.inside(prefix)[1])

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        try:
            self._client.size(name)
        except FileNotFoundError:
            return False
        return True

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects. They need not be there."""
        if wanted := list(names):
            self._client.delete(wanted)

    def delete_below(self, prefix: str) -> None:
        """Delete every object below the folder ``prefix``."""
        self._client.delete_below(prefix)

    @property
    def _client(self) -> StoreClient:
        return _client(self.url, os.getpid())

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except PromiseBroken as error:
            expected = f"a storage that creates a file only if there is none: otherwise two coordinators could commit ({error})"
            raise InvalidSetting(_SETTING, self.shown, expected) from None
        except Unusable as error:
            expected = f"a storage that can be opened and written to ({error})"
            raise InvalidSetting(_SETTING, self.shown, expected) from None


@lru_cache
def _client(url: str, process: int) -> StoreClient:
    """A client, which a process that is forked does not share."""
    if url.partition("://")[0] in SCHEMES:
        return ObstoreClient(url)
    return FsspecClient(url, without_password(url))


def without_password(url: str) -> str:
    """A URL as it is told: without the password, and without what follows a question mark, which may have one."""
    parts = _parts(url)
    if parts is None:  # any of it may be of the password
        return f"{url.partition('://')[0]}://***"
    who, at, where = parts.netloc.rpartition("@")
    named = f"{who.partition(':')[0]}:***" if ":" in who else who
    return f"{parts.scheme}://{named}{at}{where}{parts.path}"


def _parts(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # of a password with a slash, what is before the slash is taken for a port
    except ValueError:
        return None
    return parts


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
