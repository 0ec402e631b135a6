"""The manifest of a job's partition: which client got which rows, as one document.

Two jobs whose manifests have the same hash trained on the same rows, partitioned in the same way. The manifest depends on the
job and its rows alone, so a job has the same hash on any machine (docs/heterogeneity.md).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Literal

import numpy as np

from chainfed_ray.data.sources import Corpus, Split
from chainfed_ray.data.tokens import ExampleCounts
from chainfed_ray.errors import InvalidJob
from chainfed_ray.record import Document, Record
from chainfed_ray.spec.job import JobSpec

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

    @classmethod
    def simulated(cls, client: str, client_class: str, rows: np.ndarray, labels: Sequence[str]) -> "ClientPartition":
        """The rows at the indices ``rows`` of the training rows, which have ``labels``; empty without classes."""
        indices = rows.tolist()
        return cls(
            client=client,
            client_class=client_class,
            rows=len(indices),
            rows_per_class=dict(Counter(labels[index] for index in indices)) if labels else {},
            sha256=sha256(_canonical(indices).encode()).hexdigest(),
        )

    @classmethod
    def at_site(
        cls, client: str, client_class: str, counts: ExampleCounts, classes: Mapping[str, int]
    ) -> "ClientPartition":
        """The rows of a client at a site, which are known by their ``counts`` and how many each of the ``classes`` has."""
        known = [counts.examples, counts.longest, counts.tokens]
        return cls(
            client=client,
            client_class=client_class,
            rows=counts.examples,
            rows_per_class=dict(classes),
            sha256=sha256(_canonical(known).encode()).hexdigest(),
        )


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

    @classmethod
    def of(
        cls, spec: JobSpec, corpus: Corpus, clients: Sequence[ClientPartition], rule: str | None = None
    ) -> "Manifest":
        """The manifest of a partition.

        ``clients`` are those of the fleet, in its order. ``rule`` is the name of the caller's own partition rule, if it is not
        the job's.
        """
        partition, data = spec.fleet.partition, spec.data
        return cls(
            scheme=rule or partition.scheme,
            alpha=partition.alpha if rule is None and partition.scheme in ("dirichlet", "quantity") else None,
            column=partition.column,
            seed=spec.seed,
            splits=(
                *_split_rows("train", data.train, corpus.train),
                *_split_rows("validation", data.validation or data.train, corpus.validation),
                *_split_rows("test", data.test or data.train, corpus.test),
            ),
            clients=tuple(clients),
        )

    def canonical(self) -> bytes:
        """The manifest as canonical JSON: keys sorted, no spaces, ASCII. Equal manifests give equal bytes."""
        return _canonical(self.model_dump()).encode()

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


def _split_rows(name: SplitName, source: str | None, split: Split) -> tuple[SplitRows, ...]:
    """The rows of one split; none if the job has none of its own, since every client is at a site."""
    if source is None:
        return ()
    digest = sha256()
    columns = [column for column in (split.texts, split.labels, split.groups) if column]
    for row in zip(*columns, strict=True):
        digest.update(_canonical(row).encode() + b"\n")
    return (SplitRows(split=name, source=source, rows=len(split), sha256=digest.hexdigest()),)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
