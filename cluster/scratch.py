"""Deletes the prefix caches of jobs that are over, on every machine that may have some."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from chainfed_ray.cluster.occupancy import is_free
from chainfed_ray.cluster.resources import CLIENT_SLOT, COORDINATOR_SLOT

_PATIENCE_SECONDS = 60.0  # for the end of processes that were told to end
_POLL_SECONDS = 0.2


def delete_everywhere(folders: Sequence[Path]) -> None:
    """Delete ``folders`` on every machine of ours, each as soon as no process uses it. This does not wait for that."""
    task: Any = _delete
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"] and {CLIENT_SLOT, COORDINATOR_SLOT} & node["Resources"].keys():
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task.options(scheduling_strategy=there).remote(folders)


@ray.remote(num_cpus=0, max_retries=0)
def _delete(folders: Sequence[Path]) -> None:
    ends = monotonic() + _PATIENCE_SECONDS
    for folder in folders:
        while not is_free(folder) and monotonic() < ends:
            sleep(_POLL_SECONDS)
        if is_free(folder):  # or the job was taken up again, and uses it
            shutil.rmtree(folder, ignore_errors=True)
