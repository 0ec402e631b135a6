"""How examples are dealt to simulated clients. Every row goes to exactly one client, and every client gets some."""

import numpy as np

from chainfed_ray.errors import InvalidJob


def iid(labels: np.ndarray, clients: int, seed: int) -> list[np.ndarray]:
    """Even shares at random: the row indices of each client.

    Raises:
        InvalidJob: there are more clients than rows.
    """
    _check(len(labels), clients)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    return [np.sort(share) for share in np.array_split(shuffled, clients)]


def dirichlet(labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Label skew: each class is split by a draw from Dirichlet(alpha) (Hsu et al., 2019).

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
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return [np.sort(np.array(share, dtype=np.int64)) for share in shares]


def _proportions(generator: np.random.Generator, clients: int, alpha: float) -> np.ndarray:
    drawn = generator.dirichlet(np.full(clients, alpha))
    if np.isfinite(drawn).all() and np.isclose(drawn.sum(), 1):
        return drawn
    # At a very small alpha every gamma draw underflows: its limit is all to one client.
    one = np.zeros(clients)
    one[generator.integers(clients)] = 1
    return one


def _check(rows: int, clients: int) -> None:
    if clients > rows:
        raise InvalidJob.at("fleet.clients", f"{clients} clients", f"at most {rows}, the training rows")
