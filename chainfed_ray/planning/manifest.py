"""Makes the manifest of a job's partition: which client has which rows, as digests."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256

import numpy as np

from chainfed_ray.client.survey import Absence, Survey
from chainfed_ray.data.sources import Corpus, Split
from chainfed_ray.data.tokens import ExampleCounts
from chainfed_ray.planning.candidates import Candidate
from chainfed_ray.records.manifest import ClientPartition, Manifest, SplitName, SplitRows, canonical
from chainfed_ray.spec.fleet import PartitionSpec
from chainfed_ray.spec.sections import DataSpec


def manifest_of(
    data: DataSpec,
    partition: PartitionSpec,
    seed: int,
    corpus: Corpus,
    clients: Iterable[ClientPartition],
    rule: str | None = None,
) -> Manifest:
    """The manifest of a job's partition. ``clients`` are those of the fleet, in its order.

    ``rule`` is the name of the caller's own partition rule, if it is not the job's.
    """
    return Manifest(
        scheme=rule or partition.scheme,
        alpha=partition.alpha if rule is None and partition.scheme in ("dirichlet", "quantity") else None,
        column=partition.column,
        seed=seed,
        splits=(
            *_split_rows("train", data.train, corpus.train),
            *_split_rows("validation", data.validation or data.train, corpus.validation),
            *_split_rows("test", data.test or data.train, corpus.test),
        ),
        clients=tuple(clients),
    )


def partitions_of(
    clients: Iterable[Candidate],
    labels: Sequence[str],
    shares: Iterable[np.ndarray],
    surveys: Mapping[str, Survey | Absence],
) -> list[ClientPartition]:
    """The rows of each of the ``clients``, for the manifest.

    ``shares`` are the row indices of simulated clients, in the order of the fleet; the training rows have ``labels``.
    ``surveys`` are the answers of sites.
    """
    rows, found = iter(shares), list[ClientPartition]()
    for candidate in clients:
        name, group = candidate.name, candidate.client_class
        survey = surveys.get(group)
        if candidate.remote and isinstance(survey, Survey):
            classes = survey.clients[candidate.remote.part].classes
            found.append(_at_site(name, group, candidate.counts, classes))
        else:
            found.append(simulated(name, group, next(rows), labels))
    return found


def simulated(client: str, client_class: str, rows: np.ndarray, labels: Sequence[str]) -> ClientPartition:
    """The client that has the indices ``rows`` of the training rows, which have ``labels``; empty without classes."""
    indices = rows.tolist()
    return ClientPartition(
        client=client,
        client_class=client_class,
        rows=len(indices),
        rows_per_class=dict(Counter(labels[index] for index in indices)) if labels else {},
        sha256=sha256(canonical(indices).encode()).hexdigest(),
    )


def _at_site(client: str, client_class: str, counts: ExampleCounts, classes: Mapping[str, int]) -> ClientPartition:
    """The client whose rows are known by their ``counts``, and by how many each of the ``classes`` has."""
    known = [counts.examples, counts.longest, counts.tokens]
    return ClientPartition(
        client=client,
        client_class=client_class,
        rows=counts.examples,
        rows_per_class=dict(classes),
        sha256=sha256(canonical(known).encode()).hexdigest(),
    )


def _split_rows(name: SplitName, source: str | None, split: Split) -> tuple[SplitRows, ...]:
    """The rows of one split; none if the job has none of its own, since every client is at a site."""
    if source is None:
        return ()
    digest = sha256()
    columns = [column for column in (split.texts, split.labels, split.groups) if column]
    for row in zip(*columns, strict=True):
        digest.update(canonical(row).encode() + b"\n")
    return (SplitRows(split=name, source=source, rows=len(split), sha256=digest.hexdigest()),)
