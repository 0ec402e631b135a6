"""The resources that our actors request from Ray's scheduler.

Memory is one of Ray's own resources. Two custom resources choose the machines: a machine has a ``client_slot`` for each client
that it may run at a time, and a ``coordinator_slot`` for each job that it may coordinate. Every actor of ours requests one of
them. So none runs on a cluster's head, which has neither, and none but a client's keeps a machine for clients from going.
A third, ``only_machine``, marks a cluster that is one machine: nobody asks for it.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from chainfed_ray.cluster.structured_logs import LOG
from chainfed_ray.device import start_forked
from chainfed_ray.device.peak import ENVIRONMENT

CLIENT_SLOT = "client_slot"
COORDINATOR_SLOT = "coordinator_slot"
ONLY_MACHINE = "only_machine"

# The memory of a client's process before a client uses it: 384 MiB if it loads its libraries itself, and a margin
# (`python -m benchmarks idle`). Forked ones share most of it, but a machine's first one holds all of it.
IDLE_BYTES = 395 * 2**20

# The same for a process of an evaluation with the weights on disk, which also loads DeepSpeed and Ray Train.
OFFLOAD_IDLE_BYTES = 550 * 2**20

# What the check of a job holds above its idle process, for most jobs.
PREFLIGHT_BYTES = 512 * 2**20

# What the processes of a machine are forked with. None of our actors' files is among it: Ray draws a random id for each class
# of actors. Processes that are forked after its first one draw the same ids for their tasks, and Ray takes one for another.
_LOADED = "ray,chainfed_ray.client.turn"
_NOTHING: Mapping[str, str] = MappingProxyType({})

# A part of a coordinator_slot so small that it takes no coordinator's place. It requests such a machine for light work.
_BESIDE_COORDINATORS = 0.001


def client_options(budget_bytes: int) -> dict[str, Any]:
    """The options of an actor that runs turns of clients with this budget."""
    return {
        "num_cpus": 0,
        "memory": IDLE_BYTES + budget_bytes,
        "resources": {CLIENT_SLOT: 1},
        "runtime_env": runtime_env(),
    }


def runtime_env(environment: Mapping[str, str] = _NOTHING) -> dict[str, Any]:
    """The runtime environment of a Ray process that is forked from one which has loaded what a turn needs.

    All have the variables of processes that take turns, since whichever comes first starts the process that they are forked
    from. ``environment`` has more of them. Ray passes the command through a shell and does not quote it, so we do.
    """
    forked = [sys.executable, "-I", "-S", start_forked.__file__, _LOADED]
    logs = {LOG: os.environ[LOG]} if LOG in os.environ else {}  # also on machines whose own environment lacks it
    return {"env_vars": {**ENVIRONMENT, **logs, **environment}, "py_executable": shlex.join(forked)}


def coordinator_options() -> dict[str, Any]:
    """The options of the actor that coordinates a job."""
    return {"num_cpus": 0, "resources": {COORDINATOR_SLOT: 1}, "runtime_env": runtime_env()}


def controller_options() -> dict[str, Any]:
    """The options of light actors: the controller, and the actor of an evaluation's run."""
    return {"num_cpus": 0, "resources": {COORDINATOR_SLOT: _BESIDE_COORDINATORS}}


def preflight_options() -> dict[str, Any]:
    """The options of a dry run. Most hold no more than this; a few are limited to more."""
    return {
        "num_cpus": 1,
        "memory": IDLE_BYTES + PREFLIGHT_BYTES,
        "resources": {COORDINATOR_SLOT: _BESIDE_COORDINATORS},
        "runtime_env": runtime_env(),
    }


def check_options() -> dict[str, Any]:
    """The options of the process that checks jobs. It waits for the next job most of the time, so it requests no core.

    Nor does it request memory: what it kept would be kept from clients for as long as the service runs, and a client that is
    given all that ``placement`` allows would never be placed. It holds some 115 MiB of its own while it waits.
    """
    return {"num_cpus": 0, "resources": {COORDINATOR_SLOT: _BESIDE_COORDINATORS}, "runtime_env": runtime_env()}


def on_this_machine() -> dict[str, Any]:
    """The option of an actor or a task that may run on no other machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def api_options() -> dict[str, Any]:
    """The options of a process of the API. On a machine for clients it would keep the autoscaler from removing that."""
    return {"num_cpus": 0, "resources": {COORDINATOR_SLOT: _BESIDE_COORDINATORS}}


def inference_options(most_bytes: int | None = None) -> dict[str, Any]:
    """The options of an actor that answers with models of ``most_bytes``. It returns freed memory to the system."""
    memory = {} if most_bytes is None else {"memory": IDLE_BYTES + most_bytes}
    return {**api_options(), "runtime_env": runtime_env(), **memory}


def evaluation_resources(planned_bytes: int) -> dict[str, float]:
    """The resources of a process that evaluates the whole model: memory, on a machine that may coordinate jobs.

    It requests no core: it must find room beside clients that train, and it waits for the disk most of the time.
    """
    return {"CPU": 0, "memory": OFFLOAD_IDLE_BYTES + planned_bytes, COORDINATOR_SLOT: _BESIDE_COORDINATORS}


def one_machine_resources(client_slots: int, parallel_jobs: int) -> dict[str, float]:
    """The custom resources of a cluster that is a single machine."""
    return {CLIENT_SLOT: client_slots, COORDINATOR_SLOT: parallel_jobs + 1, ONLY_MACHINE: 1}
