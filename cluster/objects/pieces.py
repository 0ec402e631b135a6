"""A file that arrives in pieces, each an object with the place of its first byte as its name.

Any process may put the next piece, and a piece is there as a whole or not at all. Of two that come for the same place at the
same time, the first stays.
"""

from collections.abc import Iterator

from chainfed_ray.cluster.objects.object_store import ObjectStore


class Pieces:
    """The pieces below ``prefix``, which ends with a name that no other file has."""

    def __init__(self, objects: ObjectStore, prefix: str) -> None:
        self._objects, self._prefix = objects, prefix

    def received(self) -> int:
        """How many bytes are there, from the first one on without a gap."""
        return sum(size for _, size in self._pieces())

    def newest(self) -> float:
        """When the newest piece came, in seconds since 1970; 0 without a piece."""
        return max((found.put_at for found in self._objects.below(self._prefix)), default=0.0)

    def put(self, offset: int, piece: bytes) -> None:
        """Put the piece from ``offset`` on.

        Raises:
            FileExistsError: there is another one.
        """
        self._objects.create(f"{self._prefix}/{offset:020d}", piece)

    def read(self) -> Iterator[bytes]:
        """The bytes that are there, a part at a time."""
        for name, size in self._pieces():
            yield from self._objects.parts(name, size)

    def clear(self) -> None:
        """Delete every piece."""
        self._objects.delete_below(self._prefix)

    def _pieces(self) -> Iterator[tuple[str, int]]:
        end = 0
        for found in self._objects.below(self._prefix):
            if found.name.rpartition("/")[2] == f"{end:020d}":
                end += found.bytes
                yield found.name, found.bytes
