"""S3, Google's and Microsoft's stores by ``obstore``, all of which is behind this door.

Credentials come from the environment, such as ``AWS_ACCESS_KEY_ID``.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from errno import ENOTCONN
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainfed_ray.cluster.objects.store_client import StoredObject

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Client

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
"""Stores that are known to put an object on the condition that there is none."""
_TIMES: dict[str, Any] = {"timeout": "60s", "connect_timeout": "5s", "allow_http": True}  # http, if the endpoint is
_RETRIES, _RETRY_SECONDS = 4, 20  # of a request that failed; then the store is away


class ObstoreClient:
    """See ``StoreClient``.

    Raises:
        ModuleNotFoundError: obstore is not installed.
        Exception: of obstore: the URL is none, or the environment does not say what it must.
    """

    def __init__(self, url: str) -> None:
        from obstore.store import from_url

        retries: Any = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)}
        made: Any = from_url  # its types are of each store apart
        self._client: Client = made(url, client_options=_TIMES, retry_config=retries)
        self._url = url

    def put(self, name: str, data: bytes | Path) -> None:
        """See ``StoreClient``."""
        with self._asking():
            self._client.put(name, data)

    def create(self, name: str, data: bytes) -> None:
        """See ``StoreClient``."""
        with self._asking():
            self._client.put(name, data, mode="create")

    def get(self, name: str) -> bytes:
        """See ``StoreClient``."""
        with self._asking():
            return bytes(self._client.get(name).bytes())

    def size(self, name: str) -> int:
        """See ``StoreClient``."""
        with self._asking():
            return self._client.head(name)["size"]

    def part(self, name: str, start: int, length: int) -> bytes:
        """See ``StoreClient``."""
        with self._asking():
            return bytes(self._client.get_range(name, start=start, length=length))

    def below(self, prefix: str, after: str | None) -> Iterable[StoredObject]:
        """See ``StoreClient``."""
        with self._asking():
            found = self._client.list(prefix, offset=after).collect()
        return [StoredObject(one["path"], one["size"], one["last_modified"].timestamp()) for one in found]

    def inside(self, prefix: str) -> tuple[Iterable[str], Iterable[str]]:
        """See ``StoreClient``."""
        with self._asking():
            found = self._client.list_with_delimiter(prefix)
        folders = [one.rstrip("/").rpartition("/")[2] for one in found["common_prefixes"]]
        return folders, [one["path"].rpartition("/")[2] for one in found["objects"]]

    def delete(self, names: list[str]) -> None:
        """See ``StoreClient``."""
        with suppress(FileNotFoundError), self._asking():
            return self._client.delete(names)
        for name in names:  # Azure and Google refuse to delete what is not there, and the rest with it
            with suppress(FileNotFoundError), self._asking():
                self._client.delete(name)

    def delete_below(self, prefix: str) -> None:
        """See ``StoreClient``."""
        if names := [one.name for one in self.below(prefix, None)]:
            self.delete(names)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            yield
        except AlreadyExistsError as error:
            raise FileExistsError(str(error).partition("\n")[0]) from None
        except BaseError as error:
            reason = str(error).partition("\n")[0]
            raise OSError(ENOTCONN, f"the object store does not answer ({reason})", self._url) from error
