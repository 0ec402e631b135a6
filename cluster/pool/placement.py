"""What the cluster can never place, said at once: a client with more memory than any machine has.

It is certain only if no machine is added later. So it is known of a cluster that we started, which is one machine.
"""

from collections.abc import Sequence

import ray

from chainfed_ray.client.messages import Client
from chainfed_ray.client.pool import Failure
from chainfed_ray.cluster.resources import IDLE_BYTES, ONLY_MACHINE
from chainfed_ray.errors import InvalidJob
from chainfed_ray.units import format_bytes


def check_memories(memories: Sequence[int]) -> None:
    """Check that each class of clients can be placed. ``memories`` are the bytes of ``fleet.clients[].memory``, in order.

    Raises:
        InvalidJob: a class has more than any machine of this cluster.
    """
    most = _most_memory()
    for index, memory in enumerate(memories):
        if most is not None and memory > most:
            raise InvalidJob.at(f"fleet.clients[{index}].memory", format_bytes(memory), f"at most {_limit(most)}")


def never_placed(clients: Sequence[Client]) -> dict[int, Failure]:
    """The failures of those of ``clients`` that can never be placed, by their places."""
    most = _most_memory()
    if most is None:
        return {}
    return {
        place: Failure(
            f"no machine has the {format_bytes(client.budget_bytes)} that it may use: the most is {_limit(most)}"
        )
        for place, client in enumerate(clients)
        if client.budget_bytes > most
    }


def is_one_machine() -> bool:
    """Whether this cluster is a single machine, and stays one."""
    return any(ONLY_MACHINE in resources for resources in _machines())


def _machines() -> list[dict[str, float]]:
    """The resources of each machine."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _most_memory() -> int | None:
    """The largest budget in bytes that a client can have on this cluster; None if that is not certain."""
    machines = _machines()
    if not any(ONLY_MACHINE in resources for resources in machines):
        return None
    return max(int(max(resources.get("memory", 0) for resources in machines)) - IDLE_BYTES, 0)


def _limit(most: int) -> str:
    idle = format_bytes(IDLE_BYTES)
    return f"{format_bytes(most)}, the memory of this machine that Ray gives away less {idle} for the idle process"
