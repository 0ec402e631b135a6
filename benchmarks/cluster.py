"""A Ray cluster of this process alone, for as long as a measurement lasts."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_machine() -> Iterator[None]:
    """Two cores, two clients and a coordinator at a time. Ray reads its environment when it is first imported: not before."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    from chainfed_ray.cluster.resources import one_machine_resources

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
