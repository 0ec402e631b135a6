"""How examples are dealt to simulated clients. Every row goes to exactly one client, and every client gets some.

Nothing is drawn again until it fits, so every scheme ends, whatever its parameters (docs/heterogeneity.md).
"""

from collections import defaultdict
from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import Protocol

import numpy as np

from chainfed_ray.errors import InvalidJob
from chainfed_ray.record import named
from chainfed_ray.spec.sections import PartitionSpec


class PartitionRule(Protocol):
    """A partition of one's own (docs/python.md): the row indices of each client.

    ``labels`` [n] are the training rows' classes as numbers, ``groups`` their values of ``fleet.partition.column``, empty
    without one. Each row must go to exactly one client, and each client must get a row.
    """

    def __call__(
        self, labels: np.ndarray, groups: Sequence[str], clients: int, seed: int
    ) -> Sequence[Sequence[int] | np.ndarray]: ...


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
    """The row indices of each client; ``values`` are those of ``spec.column``, which no other scheme asks for.

    Raises:
        InvalidJob: there are more clients than rows, or than values.
    """
    if spec.scheme == "column":
        assert spec.column is not None, "a scheme without its column is refused by config"
        return by_column(values, clients, spec.column)
    if spec.scheme == "dirichlet":
        return dirichlet(labels, clients, spec.alpha, seed)
    if spec.scheme == "quantity":
        return quantity(labels, clients, spec.alpha, seed)
    return iid(labels, clients, seed)


def iid(labels: np.ndarray, clients: int, seed: int) -> list[np.ndarray]:
    """Even shares at random: the row indices of each client.

    Raises:
        InvalidJob: there are more clients than rows.
    """
    _check(len(labels), clients)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    return [np.sort(share) for share in np.array_split(shuffled, clients)]


def dirichlet(labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Label skew: each class is split by a draw from Dirichlet(alpha) (Yurochkin et al., 2019).

    A client that would get nothing is given a row of the largest share. Drawing again until each has enough may never end.

    Raises:
        InvalidJob: there are more clients than rows.
    """
    _check(len(labels), clients)
    generator = np.random.default_rng(seed)
    shares: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(_proportions(generator, clients, alpha))[:-1] * len(rows)).round().astype(int)
        for share, part in zip(shares, np.split(rows, cuts), strict=True):
            share.extend(part.tolist())
    _fill_the_empty(shares)
    return [np.sort(np.array(share, dtype=np.int64)) for share in shares]


def quantity(labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Quantity skew: numbers of rows by one draw from Dirichlet(alpha), whatever their classes (Li et al., 2022).

    Each client has one row in advance, and its share of the others.

    Raises:
        InvalidJob: there are more clients than rows.
    """
    _check(len(labels), clients)
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    others = len(labels) - clients
    cuts = (np.cumsum(_proportions(generator, clients, alpha))[:-1] * others).round().astype(int)
    return [np.sort(share) for share in np.split(shuffled, cuts + np.arange(1, clients))]


def by_column(values: Sequence[str], clients: int, column: str) -> list[np.ndarray]:
    """Rows with the same value of ``column`` stay together; no row is left to chance.

    Values are dealt whole, the largest first, each to the client with the fewest rows (Graham, 1969); of those that are
    alike, to the first.

    Raises:
        InvalidJob: there are more clients than values.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, value in enumerate(values):
        rows[value].append(row)
    if clients > len(rows):
        expected = f"a column with {clients} values or more, one for each client; its training rows have {len(rows)}"
        raise InvalidJob.at("fleet.partition.column", column, expected)
    shares: list[list[int]] = [[] for _ in range(clients)]
    loads = [(0, client) for client in range(clients)]
    for value in sorted(rows, key=lambda value: (-len(rows[value]), value)):
        load, client = loads[0]
        shares[client] += rows[value]
        heapreplace(loads, (load + len(rows[value]), client))
    return [np.sort(np.array(share, dtype=np.int64)) for share in shares]


def _fill_the_empty(shares: list[list[int]]) -> None:
    """Give each empty share the last row of the share that is largest then."""
    largest = [(-len(share), client) for client, share in enumerate(shares) if share]
    heapify(largest)
    for share in shares:
        if not share:
            size, client = largest[0]
            share.append(shares[client].pop())
            heapreplace(largest, (size + 1, client))


def _proportions(generator: np.random.Generator, clients: int, alpha: float) -> np.ndarray:
    """A draw from Dirichlet(alpha), or its limit where that is beyond what floating-point numbers hold."""
    drawn = generator.dirichlet(np.full(clients, alpha))
    if np.isfinite(drawn).all() and np.isclose(drawn.sum(), 1):
        return drawn
    if alpha > 1:  # the sum of gamma draws overflows: even shares
        return np.full(clients, 1 / clients)
    # Every gamma draw underflows: all to one client.
    one = np.zeros(clients)
    one[generator.integers(clients)] = 1
    return one


def _check(rows: int, clients: int) -> None:
    if clients > rows:
        raise InvalidJob.at("fleet.clients", f"{clients} clients", f"at most {rows}, the training rows")
