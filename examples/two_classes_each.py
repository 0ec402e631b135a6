"""A partition of your own: each client has rows of about two classes (McMahan et al., 2017, section 3).

Run it with ``python -m examples.two_classes_each``, from a checkout.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chainfed_ray.federation.run import run_job
from examples.own_job import a_job


def two_classes_each(labels: np.ndarray, groups: Sequence[str], clients: int, seed: int) -> list[np.ndarray]:
    """Sort the rows by class, cut them into twice as many pieces as clients, and give each client two random pieces."""
    pieces = np.array_split(np.argsort(labels, kind="stable"), 2 * clients)
    places = np.random.default_rng(seed).permutation(2 * clients)
    return [np.concatenate([pieces[first], pieces[second]]) for first, second in places.reshape(clients, 2)]


if __name__ == "__main__":
    for record in run_job(a_job("two-classes"), Path("chainfed-python/two-classes"), partition=two_classes_each):
        print(record, flush=True)
