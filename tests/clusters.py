"""Starts a Ray cluster for tests and pools on it, and tells whether this machine has what DeepSpeed needs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray

from chainfed_ray.activity import Note
from chainfed_ray.client.pool import Tell
from chainfed_ray.cluster.local_ray import lean_ray
from chainfed_ray.cluster.offload.build import are_built, ops_folder
from chainfed_ray.cluster.pool.ray_pool import RayPool
from chainfed_ray.cluster.resources import one_machine_resources
from chainfed_ray.model.source import ModelSource

# Ray measures each process of the machine every five seconds, for a dashboard that is not there.
_QUIET = {"REPORTER_UPDATE_INTERVAL_MS": "3600000"}

needs_ops = pytest.mark.skipif(not are_built(ops_folder()), reason="DeepSpeed's libraries are not built; `make ops`")


@contextmanager
def one_machine() -> Iterator[None]:
    """A Ray cluster of two cores, with slots for the clients of several pools."""
    os.environ |= {**_QUIET, "RAY_AUTH_MODE": "disabled"}
    with lean_ray():
        ray.init(
            num_cpus=2,
            resources=one_machine_resources(8, 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def a_pool(
    base: ModelSource,
    slots: int,
    note: Note = lambda words: None,
    silence: float = 300.0,
    tell: Tell = lambda demand: None,
) -> Iterator[RayPool]:
    """A pool with its own client processes, which is closed at the end."""
    pool = RayPool(base, slots, note, silence=silence, tell=tell)
    try:
        yield pool
    finally:
        pool.close()
