"""Looks on every machine whether a job's processes go on there, and deletes what jobs that are over have left."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from chainfed_ray.cluster.occupancy import is_free
from chainfed_ray.cluster.resources import CLIENT_SLOT, COORDINATOR_SLOT

_PATIENCE_SECONDS = 60.0  # for the end of processes that were told to end
_POLL_SECONDS = 0.2


class Occupants:
    """Whether processes of any machine use a folder, which each machine has for itself. Nobody waits for the answers."""

    def __init__(self) -> None:
        self._asked: dict[Path, list[Any]] = {}

    def are_gone(self, folder: Path) -> bool:
        """True if no process on any machine uses ``folder``, since the question was first asked. False until all answer."""
        if folder not in self._asked:
            self._asked[folder] = on_every_machine(_is_free, folder)
        answers = self._asked[folder]
        if answers and len(ray.wait(answers, num_returns=len(answers), timeout=0)[0]) < len(answers):
            return False
        del self._asked[folder]  # the next call asks again
        return all(map(_said_free, answers))

    def forget(self, folder: Path) -> None:
        """Forget answers: from now on a process may use ``folder`` again."""
        self._asked.pop(folder, None)


def delete_everywhere(folders: Sequence[Path]) -> None:
    """Delete ``folders`` on every machine of ours, each as soon as no process uses it. This does not wait for that."""
    on_every_machine(_delete, folders)


def on_every_machine(task: Any, *arguments: Any) -> list[Any]:
    """Start a ``task`` of Ray on every machine of ours. Gives the references of what they return."""
    started = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"] and {CLIENT_SLOT, COORDINATOR_SLOT} & node["Resources"].keys():
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            started.append(task.options(scheduling_strategy=there).remote(*arguments))
    return started


def _said_free(answer: Any) -> bool:
    try:
        return bool(ray.get(answer))
    except RayError:  # the machine is gone, and its processes with it
        return True


@ray.remote(num_cpus=0, max_retries=3)
def _is_free(folder: Path) -> bool:
    return is_free(folder)


@ray.remote(num_cpus=0, max_retries=0)
def _delete(folders: Sequence[Path]) -> None:
    ends = monotonic() + _PATIENCE_SECONDS
    for folder in folders:
        while not is_free(folder) and monotonic() < ends:
            sleep(_POLL_SECONDS)
        if is_free(folder):  # or the job was taken up again, and uses it
            shutil.rmtree(folder, ignore_errors=True)
