"""A Ray cluster of this process, for the tests of a module."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from chainfed_ray.cluster.resources import of_one_machine


@contextmanager
def one_machine() -> Iterator[None]:
    """Two cores, two clients and a coordinator at a time."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        num_cpus=2,
        resources=of_one_machine(2, 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        yield
    finally:
        ray.shutdown()
