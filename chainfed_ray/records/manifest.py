"""The manifest of a job's partition: which client got which rows, as one document.

Two jobs whose manifests have the same hash trained on the same rows, partitioned in the same way. The manifest depends on the
job and its rows alone, so a job has the same hash on any machine (docs/heterogeneity.md). ``planning/manifest`` makes it.
"""

import json
from hashlib import sha256
from typing import Literal

from chainfed_ray.errors import InvalidJob
from chainfed_ray.record import Document, Record

SplitName = Literal["train", "validation", "test"]


class SplitRows(Record):
    """The rows of a split: their source, their number and their digest.

    ``sha256`` is the digest of one line of JSON for each row, in order. A line has the row's text, its label if the job reads
    labels and, if the rows are partitioned by a column, its value in that column.
    """

    split: SplitName
    source: str
    rows: int
    sha256: str


class ClientPartition(Record):
    """The rows of one client. ``sha256`` is the digest of their indices in the training rows, as a JSON list.

    The server does not know the rows of a client at a site: ``sha256`` is then the digest of their counts.
    """

    client: str
    client_class: str
    rows: int
    rows_per_class: dict[str, int]
    sha256: str


class Manifest(Document):
    """A partition: its scheme, its rows, and the rows of every client of the fleet, including clients that cannot take part.

    ``alpha`` and ``column`` are None if the scheme does not use them.
    """

    scheme: str
    alpha: float | None
    column: str | None
    seed: int
    splits: tuple[SplitRows, ...]
    clients: tuple[ClientPartition, ...]

    def canonical(self) -> bytes:
        """The manifest as canonical JSON. Equal manifests give equal bytes."""
        return canonical(self.model_dump()).encode()

    @property
    def hash(self) -> str:
        """The sha256 of the canonical JSON, in hexadecimal."""
        return sha256(self.canonical()).hexdigest()

    def check_unchanged(self, hash_at_start: str) -> None:
        """Check that a resumed job has the partition with which it started.

        Raises:
            InvalidJob: the rows or their partition have changed since then.
        """
        if self.hash != hash_at_start:
            hashes = f"their partition had the hash {hash_at_start}; now it has {self.hash}"
            expected = f"the rows with which the job began ({hashes})"
            raise InvalidJob.at("data.train", self.splits[0].source, expected)


def canonical(value: object) -> str:
    """``value`` as JSON of which a digest is taken: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
