"""Partitions examples among simulated clients. Every row goes to exactly one client, and every client gets at least one.

No scheme repeats a draw until it fits, so each one ends, whatever its parameters (docs/heterogeneity.md).
"""

from collections import defaultdict
from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import Protocol

import numpy as np

from chainfed_ray.errors import InvalidJob
from chainfed_ray.record import named
from chainfed_ray.seeds import derive
from chainfed_ray.spec.fleet import FleetSpec, PartitionSpec


class PartitionRule(Protocol):
    """A partition of one's own (docs/python.md): the row indices of each client.

    ``labels`` [n] are the training rows' classes as numbers, ``groups`` their values of ``fleet.partition.column``, empty
    without one. Each row must go to exactly one client, and each client must get a row.
    """

    def __call__(
        self, labels: np.ndarray, groups: Sequence[str], clients: int, seed: int
    ) -> Sequence[Sequence[int] | np.ndarray]: ...


def shares_of(
    fleet: FleetSpec, seed: int, labels: np.ndarray, groups: Sequence[str], rule: PartitionRule | None
) -> list[np.ndarray]:
    """The row indices of each simulated client, in the order of the fleet, by its own partition or the caller's ``rule``.

    ``seed`` is the job's. ``labels`` and ``groups`` are those of ``PartitionRule``.

    Raises:
        InvalidJob: the rows cannot be partitioned so.
    """
    count, seed = fleet.size, derive(seed, "partition")
    if not count:
        return []
    if rule is not None:
        return partition_by(rule, labels, groups, count, seed)
    return partition_examples(fleet.partition, labels, groups, count, seed)


def partition_by(
    rule: PartitionRule, labels: np.ndarray, groups: Sequence[str], clients: int, seed: int
) -> list[np.ndarray]:
    """The row indices of each client by a rule of one's own, in ascending order.

    Raises:
        InvalidJob: the rule did not give each row to exactly one client, and a row to each client.
    """
    given = [np.sort(np.asarray(rows, dtype=np.int64)) for rows in rule(labels, groups, clients, seed)]
    if len(given) != clients or any(not len(rows) for rows in given):
        sizes = [len(rows) for rows in given]
        raise InvalidJob.at(
            "partition", named(rule), f"a rule that gives rows to each of {clients} clients; it gave {sizes}"
        )
    if not np.array_equal(np.sort(np.concatenate(given)), np.arange(len(labels))):
        expected = f"a rule that gives each of the {len(labels)} training rows to exactly one client"
        raise InvalidJob.at("partition", named(rule), expected)
    return given


def partition_examples(
    spec: PartitionSpec, labels: np.ndarray, values: Sequence[str], clients: int, seed: int
) -> list[np.ndarray]:
    """The row indices of each client, by the scheme of ``spec``.

    ``labels`` [n] are the classes. ``values`` are the values of ``spec.column``; only the scheme ``column`` uses them.

    Raises:
        InvalidJob: there are more clients than rows, or than values of the column.
    """
    if spec.scheme == "column":
        assert spec.column is not None, "the parser refuses this scheme without a column"
        return by_column(values, clients, spec.column)
    if spec.scheme == "dirichlet":
        return dirichlet(labels, clients, spec.alpha, seed)
    if spec.scheme == "quantity":
        return quantity(labels, clients, spec.alpha, seed)
    return iid(labels, clients, seed)


def iid(labels: np.ndarray, clients: int, seed: int) -> list[np.ndarray]:
    """Equal random parts: the row indices of each client.

    Raises:
        InvalidJob: there are more clients than rows.
    """
    _check(len(labels), clients)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    return [np.sort(part) for part in np.array_split(shuffled, clients)]


def dirichlet(labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Label skew: the rows of each class are divided by a draw from Dirichlet(alpha) (Yurochkin et al., 2019).

    A client that gets nothing receives a row of the client with the most. Repeating the draw until every client has enough, as
    others do, may never end.

    Raises:
        InvalidJob: there are more clients than rows.
    """
    _check(len(labels), clients)
    generator = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(_proportions(generator, clients, alpha))[:-1] * len(rows)).round().astype(int)
        for part, drawn in zip(parts, np.split(rows, cuts), strict=True):
            part.extend(drawn.tolist())
    _fill_empty(parts)
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def quantity(labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Quantity skew: the clients' row counts are drawn once from Dirichlet(alpha), regardless of classes (Li et al., 2022).

    Each client gets one row first, and then its part of the rest.

    Raises:
        InvalidJob: there are more clients than rows.
    """
    _check(len(labels), clients)
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    others = len(labels) - clients
    cuts = (np.cumsum(_proportions(generator, clients, alpha))[:-1] * others).round().astype(int)
    return [np.sort(part) for part in np.split(shuffled, cuts + np.arange(1, clients))]


def by_column(values: Sequence[str], clients: int, column: str) -> list[np.ndarray]:
    """Rows with the same value of ``column`` go to the same client; nothing is random.

    The values are assigned from the one with the most rows down, each to the client with the fewest rows so far (Graham, 1969).
    Among equal clients the first one gets it.

    Raises:
        InvalidJob: there are more clients than values.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, value in enumerate(values):
        rows[value].append(row)
    if clients > len(rows):
        expected = f"a column with {clients} values or more, one for each client; its training rows have {len(rows)}"
        raise InvalidJob.at("fleet.partition.column", column, expected)
    parts: list[list[int]] = [[] for _ in range(clients)]
    loads = [(0, client) for client in range(clients)]
    for value in sorted(rows, key=lambda value: (-len(rows[value]), value)):
        load, client = loads[0]
        parts[client] += rows[value]
        heapreplace(loads, (load + len(rows[value]), client))
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def _fill_empty(parts: list[list[int]]) -> None:
    """Move one row to each client without rows, from the client that has the most at that time."""
    largest = [(-len(part), client) for client, part in enumerate(parts) if part]
    heapify(largest)
    for part in parts:
        if not part:
            size, client = largest[0]
            part.append(parts[client].pop())
            heapreplace(largest, (size + 1, client))


def _proportions(generator: np.random.Generator, clients: int, alpha: float) -> np.ndarray:
    """A draw from Dirichlet(alpha); for an ``alpha`` too extreme for floating point, from the limiting distribution."""
    drawn = generator.dirichlet(np.full(clients, alpha))
    if np.isfinite(drawn).all() and np.isclose(drawn.sum(), 1):
        return drawn
    if alpha > 1:  # the sum of gamma draws overflows; the limit is equal parts
        return np.full(clients, 1 / clients)
    # Every gamma draw underflows; in the limit one client gets everything.
    one = np.zeros(clients)
    one[generator.integers(clients)] = 1
    return one


def _check(rows: int, clients: int) -> None:
    if clients > rows:
        raise InvalidJob.at("fleet.clients", f"{clients} clients", f"at most {rows}, the number of training rows")
