"""What an object store is asked, whichever client asks it."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol


class StoredObject(NamedTuple):
    """An object's name below the store's prefix, its size in bytes, and when it was put, in seconds since 1970."""

    name: str
    bytes: int
    put_at: float


class StoreClient(Protocol):
    """Objects by name, below the prefix of a store's URL.

    Every method raises ``OSError`` with ``ENOTCONN`` if the store does not answer, or answers with an error of its own.
    """

    def put(self, name: str, data: bytes | Path) -> None:
        """Put an object, in place of the one that there may be."""
        ...

    def create(self, name: str, data: bytes) -> None:
        """Put an object if there is none of this name.

        Raises:
            FileExistsError: there is one. It may be what a first try has put, whose answer was lost.
        """
        ...

    def get(self, name: str) -> bytes:
        """The bytes of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def size(self, name: str) -> int:
        """How many bytes an object has.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def part(self, name: str, start: int, length: int) -> bytes:
        """``length`` bytes of an object, from ``start`` on.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def below(self, prefix: str, after: str | None) -> Iterable[StoredObject]:
        """The objects below the folder ``prefix``; only those behind the name ``after``."""
        ...

    def inside(self, prefix: str) -> tuple[Iterable[str], Iterable[str]]:
        """The names of the folders and of the objects in the folder ``prefix`` itself."""
        ...

    def delete(self, names: list[str]) -> None:
        """Delete objects. They need not be there."""
        ...

    def delete_below(self, prefix: str) -> None:
        """Delete every object below the folder ``prefix``, and the folder where there are such."""
        ...
