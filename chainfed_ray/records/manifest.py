"""What was dealt to whom, as one document. Its hash tells whether two jobs trained on the same rows, dealt alike.

It is made of the job and its rows alone, so the same job has the same hash on any machine (docs/heterogeneity.md).
"""

import json
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from typing import Literal

import numpy as np

from chainfed_ray.data.sources import Corpus, Split
from chainfed_ray.errors import InvalidJob
from chainfed_ray.record import Document, Record
from chainfed_ray.spec.job import JobSpec


class SplitRows(Record):
    """The rows of a split: where they are from, how many there are, and their digest in their order.

    ``sha256`` is of a line for each row: its text, its label if labels are read and, if rows are dealt by a column, its value
    there, as JSON.
    """

    split: Literal["train", "validation", "test"]
    source: str
    rows: int
    sha256: str


class ClientPartition(Record):
    """What a client was dealt; ``sha256`` is of the indices of its rows within the training rows, as a JSON list."""

    client: str
    client_class: str
    rows: int
    rows_per_class: dict[str, int]
    sha256: str


class Manifest(Document):
    """A deal: how it was made, of which rows, and what each client of the fleet got, whether or not it can take part.

    ``alpha`` and ``column`` are None where the scheme has none.
    """

    scheme: str
    alpha: float | None
    column: str | None
    seed: int
    splits: tuple[SplitRows, ...]
    clients: tuple[ClientPartition, ...]

    @classmethod
    def of(cls, spec: JobSpec, corpus: Corpus, shares: Sequence[np.ndarray], rule: str | None = None) -> "Manifest":
        """The manifest of a partition. ``shares`` are the clients' row indices, in the order of the fleet; ``rule`` is the name
        of the caller's own partition rule, if it is not the job's.
        """
        partition, data = spec.fleet.partition, spec.data
        return cls(
            scheme=rule or partition.scheme,
            alpha=partition.alpha if rule is None and partition.scheme in ("dirichlet", "quantity") else None,
            column=partition.column,
            seed=spec.seed,
            splits=(
                _split_rows("train", data.train, corpus.train),
                _split_rows("validation", data.validation or data.train, corpus.validation),
                _split_rows("test", data.test or data.train, corpus.test),
            ),
            clients=tuple(
                _share(name, group.name, share, corpus.train.labels)
                for (name, group), share in zip(spec.fleet.members, shares, strict=True)
            ),
        )

    def canonical(self) -> bytes:
        """The document as JSON that is written in one way only: keys sorted, no spaces, ASCII."""
        return _canonical(self.model_dump()).encode()

    @property
    def hash(self) -> str:
        """The sha256 of the canonical document."""
        return sha256(self.canonical()).hexdigest()

    def check_unchanged(self, begun_with: str) -> None:
        """A job that is resumed has the deal with which it was ``begun_with``.

        Raises:
            InvalidJob: its rows, or how they are dealt, have changed since.
        """
        if self.hash != begun_with:
            expected = (
                f"the rows with which the job began (their deal had the hash {begun_with}; now it has {self.hash})"
            )
            raise InvalidJob.at("data.train", self.splits[0].source, expected)


def _split_rows(name: Literal["train", "validation", "test"], source: str, split: Split) -> SplitRows:
    digest = sha256()
    columns = [column for column in (split.texts, split.labels, split.groups) if column]
    for row in zip(*columns, strict=True):
        digest.update(_canonical(row).encode() + b"\n")
    return SplitRows(split=name, source=source, rows=len(split), sha256=digest.hexdigest())


def _share(client: str, client_class: str, rows: np.ndarray, labels: Sequence[str]) -> ClientPartition:
    indices = rows.tolist()
    return ClientPartition(
        client=client,
        client_class=client_class,
        rows=len(indices),
        rows_per_class=dict(Counter(labels[index] for index in indices)) if labels else {},
        sha256=sha256(_canonical(indices).encode()).hexdigest(),
    )


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
