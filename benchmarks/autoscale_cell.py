"""The measurement of ``python -m benchmarks autoscale`` in a process of its own, which Ray's processes end with."""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch

from benchmarks.autoscaling_cluster import autoscaling_cluster, in_a_tree_of_its_own, kinds_alive
from benchmarks.cell_process import Row
from chainfed_ray.cluster.resources import IDLE_BYTES, client_options
from chainfed_ray.model.source import ModelSource

MIB = 2**20
# The kinds of nodes, and the budget of the clients that each is for: it has room for one, and none for the next class's.
KINDS = {"small": 600 * MIB, "medium": 1100 * MIB, "large": 2300 * MIB}
_BUDGETS = {"small": 64 * MIB, "medium": 512 * MIB, "large": 1536 * MIB}
_GIANT = 100 * 2**30
_PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.05


def main(times: int, idle_seconds: float) -> list[Row]:
    """Let clients wait, and then end all of them: ``times``, on one cluster, from its head alone each time."""
    with tempfile.TemporaryDirectory() as folder, autoscaling_cluster(KINDS, idle_seconds):
        source = ModelSource(Path(folder), torch.float32, Path(folder) / "scratch")
        return [_grown_and_shrunk(source) for _ in range(times)]


def _grown_and_shrunk(source: ModelSource) -> Row:
    """The seconds that the cluster takes: for a client of each class alone, one that is too large, and three at once."""
    from chainfed_ray.cluster.pool.autoscaler import never_met

    row: Row = {}
    clients = []
    for name in KINDS:
        began = monotonic()
        clients.append(_client(source, _BUDGETS[name]))
        row[f"{name}_seconds"] = _until(began, partial(_is_there, name), f"{name} node")
        _until(began, clients[-1].has_started, "process of a client")
    began = monotonic()
    clients.append(_client(source, _GIANT))
    row["told_seconds"] = _until(
        began, lambda: IDLE_BYTES + _GIANT in never_met(), "word of a client that is too large"
    )
    row["gone_seconds"] = _ended(clients)

    began = monotonic()
    clients = [_client(source, budget) for budget in _BUDGETS.values()]
    row["together_seconds"] = _until(began, lambda: kinds_alive(KINDS) == KINDS.keys(), "node of each kind")
    row["gone_seconds"] = max(row["gone_seconds"], _ended(clients))
    return row


def _is_there(kind: str) -> bool:
    return kind in kinds_alive(KINDS)


class _Client:
    """A process for turns of a client."""

    def __init__(self, actor: Any) -> None:
        self.actor, self._node = actor, actor.node.remote()

    def has_started(self) -> bool:
        import ray

        return bool(ray.wait([self._node], timeout=0)[0])


def _client(source: ModelSource, budget: int) -> _Client:
    from chainfed_ray.cluster.pool.actors import ClientActor

    actor_class: Any = ClientActor  # ray.remote adds `options`, which the type does not show
    return _Client(actor_class.options(**client_options(budget)).remote(source))


def _ended(clients: list[_Client]) -> float:
    """End the processes, and give the seconds until the head is alone."""
    import ray

    for client in clients:
        ray.kill(client.actor)
    return _until(monotonic(), lambda: not kinds_alive(KINDS), "cluster that is its head alone")


def _until(began: float, condition: Callable[[], bool], what: str) -> float:
    """Wait for a condition, and give the seconds since ``began``."""
    while not condition():
        if monotonic() - began > _PATIENCE_SECONDS:
            raise TimeoutError(f"no {what} within {_PATIENCE_SECONDS:g} s")
        sleep(_POLL_SECONDS)
    return monotonic() - began


if __name__ == "__main__":
    in_a_tree_of_its_own()
    print(json.dumps({"rows": main(**json.loads(sys.argv[1]))}))
