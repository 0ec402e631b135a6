"""Starts a Ray cluster on this machine for a measurement, and stops it afterwards."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_machine() -> Iterator[None]:
    """A Ray cluster with two cores, for two clients and a coordinator at the same time.

    Ray is imported here, after the environment is set, since it reads its environment when it is first imported.
    """
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    from chainfed_ray.cluster.local_ray import lean_ray
    from chainfed_ray.cluster.resources import one_machine_resources

    with lean_ray():
        ray.init(
            num_cpus=2,
            resources=one_machine_resources(2, 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        yield
    finally:
        ray.shutdown()
