"""An object store, such as S3: whole objects by name, put as a whole or not at all.

All of ``obstore`` is behind this door. A store that is away raises an ``OSError`` as a disk does that is away
(``ENOTCONN``), so whoever waits for a disk waits for the store as well. Credentials come from the environment, such as
``AWS_ACCESS_KEY_ID``.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from errno import ENOTCONN
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple

from chainfed_ray.errors import InvalidSetting, PackageMissing

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Client

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
"""Stores that can put an object on the condition that there is none: without that, two coordinators could both commit."""
_PART_BYTES = 8 * 2**20  # are asked for at once
_TIMES: dict[str, Any] = {"timeout": "60s", "connect_timeout": "5s", "allow_http": True}  # http, if the endpoint is
_RETRIES, _RETRY_SECONDS = 4, 20  # of a request that failed; then the store is away


class StoredObject(NamedTuple):
    """An object's name below the store's prefix, its size in bytes, and when it was put, in seconds since 1970."""

    name: str
    bytes: int
    put_at: float


@dataclass(frozen=True)
class ObjectStore:
    """The objects below ``url``, such as ``s3://bucket/prefix``.

    Every method raises ``OSError`` with ``ENOTCONN`` if the store does not answer, or answers with an error of its own.
    """

    url: str

    @classmethod
    def at(cls, url: str) -> "ObjectStore":
        """The store at ``url``. Nothing is asked of it yet.

        Raises:
            InvalidSetting: it is not the URL of a store that can be used.
            PackageMissing: obstore is not installed.
        """
        scheme, _, rest = url.partition("://")
        if scheme not in SCHEMES or not rest.strip("/"):
            expected = f"a folder, or a URL such as s3://bucket/prefix ({', '.join(SCHEMES)})"
            raise InvalidSetting("CHAINFED_STORAGE", url, expected)
        try:
            _client(url.rstrip("/"))
        except ModuleNotFoundError:
            raise PackageMissing(f"CHAINFED_STORAGE={url}", "obstore", "s3") from None
        except Exception as error:  # of obstore: what the environment must say and does not
            raise InvalidSetting(
                "CHAINFED_STORAGE", url, f"a store that the environment names ({_first_line(error)})"
            ) from None
        return cls(url.rstrip("/"))

    def put(self, name: str, data: bytes | Path) -> None:
        """Put an object, in place of the one that there may be."""
        with self._asking():
            _client(self.url).put(name, data)

    def create(self, name: str, data: bytes) -> None:
        """Put an object if there is none of this name: of all who try at the same time, one succeeds.

        Raises:
            FileExistsError: there is another one.
        """
        try:
            with self._asking():
                _client(self.url).put(name, data, mode="create")
        except FileExistsError:
            # The answer to a first try may be lost, and the second one then finds what the first has put.
            if self.get(name) != data:
                raise

    def get(self, name: str) -> bytes:
        """The bytes of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._asking():
            return bytes(_client(self.url).get(name).bytes())

    def parts(self, name: str, size: int | None = None) -> Iterator[bytes]:
        """The bytes of an object, or its first ``size`` ones, a part at a time; fewer if it has fewer.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._asking():
            there = _client(self.url).head(name)["size"]
        size = there if size is None else min(size, there)
        for start in range(0, size, _PART_BYTES):
            length = min(_PART_BYTES, size - start)
            with self._asking():
                part = bytes(_client(self.url).get_range(name, start=start, length=length))
            yield part

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
        with self._asking():
            found = _client(self.url).list(prefix, offset=after).collect()
        return sorted(StoredObject(one["path"], one["size"], one["last_modified"].timestamp()) for one in found)

    def folders(self, prefix: str) -> list[str]:
        """The names of the folders in the folder ``prefix``."""
        with self._asking():
            found = _client(self.url).list_with_delimiter(prefix)["common_prefixes"]
        return sorted(one.rstrip("/").rpartition("/")[2] for one in found)

    def files(self, prefix: str) -> list[str]:
        """The names of the objects in the folder ``prefix`` itself."""
        with self._asking():
            found = _client(self.url).list_with_delimiter(prefix)["objects"]
        return sorted(one["path"].rpartition("/")[2] for one in found)

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        try:
            with self._asking():
                _client(self.url).head(name)
        except FileNotFoundError:
            return False
        return True

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects. They need not be there."""
        if wanted := list(names):
            with self._asking():
                _client(self.url).delete(wanted)

    def delete_below(self, prefix: str) -> None:
        """Delete every object below the folder ``prefix``."""
        self.delete(found.name for found in self.below(prefix))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            yield
        except AlreadyExistsError as error:
            raise FileExistsError(_first_line(error)) from None
        except BaseError as error:
            raise OSError(ENOTCONN, f"the object store does not answer ({_first_line(error)})", self.url) from error


@lru_cache
def _client(url: str) -> "Client":
    from obstore.store import from_url

    retries: Any = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)}
    made: Any = from_url  # its types are of each store apart
    client: Client = made(url, client_options=_TIMES, retry_config=retries)
    return client


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
