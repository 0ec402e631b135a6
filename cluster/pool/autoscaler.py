"""What Ray's autoscaler says of the processes that clients wait for: which ask for more than any machine that it can add has.

Only autoscaler v2 says so, which KubeRay runs. Where there is none, nothing is known of machines that may come.
"""

from collections import Counter
from collections.abc import Mapping

import ray
from ray._private.state import actors  # the public one needs a dashboard
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]  # it is made when it is imported
from ray.exceptions import RayError
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from chainfed_ray.cluster.resources import CLIENT_SLOT

_ANSWER_SECONDS = 2  # how long Ray's head may take to answer


def never_met() -> set[int]:
    """The bytes of memory that waiting clients' processes ask for, and that no machine has which is there or can be added.

    Empty if there is no autoscaler, or if Ray's head does not answer. A request that waits because all machines are in use, or
    because one is on its way, is not among them.
    """
    return never_met_by(_status(), largest_machine() or 0)


def never_met_by(status: GetClusterStatusReply, largest: int) -> set[int]:
    """See ``never_met``; from what Ray's head answered, and the bytes of the ``largest`` machine for clients that is there.

    Also a group of machines at its limit makes a request infeasible, in Ray's words. Such a machine is there, and is as large
    as the request; or it is on its way, and then another one of the same requests is feasible.
    """
    infeasible = Counter(
        memory
        for request in status.autoscaling_state.infeasible_resource_requests
        if (memory := _memory(request.resources_bundle)) is not None
    )
    waiting = Counter[int]()
    for pending in status.cluster_resource_state.pending_resource_requests:
        if (memory := _memory(pending.request.resources_bundle)) is not None:
            waiting[memory] += pending.count
    return {memory for memory, count in infeasible.items() if memory > largest and count >= waiting[memory]}


def is_growing() -> bool:
    """Whether the autoscaler adds a machine now."""
    state = _status().autoscaling_state
    return bool(state.pending_instances or state.pending_instance_requests)


def may_have_room(memory: int) -> bool:
    """Whether a process that asks for ``memory`` bytes may have a machine later: one comes, or clients on a large one will end.

    What else is on a machine stays there, such as the models that are served, so nothing follows from it; nor from a process
    that has room and does not start.
    """
    if is_growing():
        return True
    return (largest_machine() or 0) >= memory and "ClientActor" in {
        actor["ActorClassName"] for actor in actors(actor_state_name="ALIVE").values()
    }


def largest_machine() -> int | None:
    """The bytes that Ray gives away of the largest machine for clients that is there; None if there is none."""
    machines = (node["Resources"] for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]
    return max((int(machine.get("memory", 0)) for machine in machines if CLIENT_SLOT in machine), default=None)


def is_gone(node: str) -> bool:
    """Whether the machine with this id is no longer part of the cluster."""
    return not any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())  # type: ignore[no-untyped-call]


def has_been_given_room(memory: int) -> bool:
    """Whether no process for clients that asks for ``memory`` bytes waits for room: Ray has chosen a machine for each.

    Such a process is starting, or cannot start, which Ray tries again and again. False also if Ray's head does not answer.
    """
    if (status := _answer()) is None:
        return False
    waiting = status.cluster_resource_state.pending_resource_requests
    return memory not in {_memory(pending.request.resources_bundle) for pending in waiting}


def _status() -> GetClusterStatusReply:
    """What Ray's head says of the cluster; nothing if it does not answer."""
    return _answer() or GetClusterStatusReply()


def _answer() -> GetClusterStatusReply | None:
    """What Ray's head says of the cluster; None if it does not answer."""
    head = internal_kv_get_gcs_client()  # type: ignore[no-untyped-call]
    try:
        return GetClusterStatusReply.FromString(head.get_cluster_status(timeout_s=_ANSWER_SECONDS))
    except RayError:
        return None


def _memory(bundle: Mapping[str, float]) -> int | None:
    """The bytes of a request for a client's process; None if it is for something else."""
    return round(bundle["memory"]) if CLIENT_SLOT in bundle and "memory" in bundle else None
