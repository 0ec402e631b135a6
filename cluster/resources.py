"""What our actors ask of Ray's scheduler.

Memory is Ray's own resource. Two custom ones say which machines are meant: ``client_slot``, one for each client that a
machine may serve at a time, and ``coordinator_slot``, one for each job that a machine may coordinate. The head of a cluster
has neither, so nothing of ours lands on it.
"""

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from chainfed_ray.device.peak import ENVIRONMENT

CLIENT_SLOT = "client_slot"
COORDINATOR_SLOT = "coordinator_slot"

# What a client's process holds before any client uses it, with a margin: 450 MiB (`python -m benchmarks idle`). Of that 157 MiB
# are pages of libraries' files, which the processes of a machine share.
IDLE_BYTES = 460 * 2**20

# The same, with DeepSpeed and Ray Train.
OFFLOAD_IDLE_BYTES = 550 * 2**20

# Work that is light, but has to run where a coordinator could.
_BESIDE_COORDINATORS = 0.001


def of_client(budget_bytes: int) -> dict[str, Any]:
    """The options of an actor that is leased to clients with this budget."""
    return {
        "num_cpus": 0,
        "memory": IDLE_BYTES + budget_bytes,
        "resources": {CLIENT_SLOT: 1},
        "runtime_env": runtime_env(ENVIRONMENT),
    }


def runtime_env(environment: Mapping[str, str]) -> dict[str, Any]:
    """What gives a process of Ray these variables.

    Ray starts such a process through a shell, with the path of its Python unquoted: a path with a space has to come quoted.
    """
    quoted = shlex.quote(sys.executable)
    python = {} if quoted == sys.executable else {"py_executable": quoted}
    return {"env_vars": dict(environment), **python}


def of_coordinator() -> dict[str, Any]:
    """The options of a job's coordinator."""
    return {"num_cpus": 0, "resources": {COORDINATOR_SLOT: 1}}


def of_controller() -> dict[str, Any]:
    """The options of the controller, and of the checks before a job is accepted."""
    return {"num_cpus": 0, "resources": {COORDINATOR_SLOT: _BESIDE_COORDINATORS}}


def of_evaluation(planned_bytes: int) -> dict[str, float]:
    """The resources of a process that judges the whole model: memory, and a machine that may coordinate jobs.

    No core is asked for: it has to find room beside clients that train, and waits for disks most of its time.
    """
    return {"CPU": 0, "memory": OFFLOAD_IDLE_BYTES + planned_bytes, COORDINATOR_SLOT: _BESIDE_COORDINATORS}


def of_one_machine(client_slots: int, parallel_jobs: int) -> dict[str, float]:
    """The custom resources of a machine that is a cluster by itself."""
    return {CLIENT_SLOT: client_slots, COORDINATOR_SLOT: parallel_jobs + 1}
