"""A Ray cluster on this machine that grows and shrinks by demand: its head alone, and nodes that Ray's autoscaler adds.

Autoscaler v2 decides, as it does under KubeRay. A node is a few processes of this machine (``autoscaling_nodes.py``).
"""

import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

_ROOT = Path(__file__).parent.parent
_LOOPBACK = "127.0.0.1"
_HEAD = "ray.head.default"  # the name that Ray's provider gives to the kind of its head
_HEAD_ID = "f" * 51 + "00000"  # and the id of its head
_STORE_BYTES = 100_000_000
_NO_KINDS: Mapping[str, int] = MappingProxyType({})
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_START_SECONDS = 120
_TRIES = 10

# So few that the parts of a node which is killed are missed within seconds.
_HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "4"}


def in_a_tree_of_its_own() -> None:
    """Make this process the root of all that it starts, and end it with its parent.

    Ray's processes leave their parents, so that they would outlive a test or a benchmark that is killed.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.signal(signal.SIGTERM, _end)


@contextmanager
def autoscaling_cluster(
    kinds: Mapping[str, int], idle_seconds: float, service: Mapping[str, int] = _NO_KINDS
) -> Iterator[None]:
    """Start a cluster whose head runs no client, connect this process to it, and end it with all of its processes.

    ``kinds`` are the kinds of nodes that the autoscaler can add, up to two of each: each with its bytes of memory and room
    for one client. Those of ``service`` have room for coordinators and the service in place of clients. A node that is idle for
    ``idle_seconds`` is removed. Call ``in_a_tree_of_its_own`` before. Nothing may have
    imported Ray.
    """
    if "ray" in sys.modules:
        raise RuntimeError("ray was imported before autoscaling_cluster could set its environment")
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on loopback
    with tempfile.TemporaryDirectory(prefix="cfr", ignore_cleanup_errors=True) as folder:
        try:
            nodes = {name: _kind(name, memory, "client_slot", 1) for name, memory in kinds.items()}
            nodes |= {name: _kind(name, memory, "coordinator_slot", 4) for name, memory in service.items()}
            address = _start_head(Path(folder), nodes, idle_seconds)
            import ray

            ray.init(address=address, namespace="chainfed", log_to_driver=False, logging_level=logging.ERROR)
            signal.signal(signal.SIGTERM, _end)  # Ray's own handler would abort this process
            try:
                yield
            finally:
                ray.shutdown()
        finally:
            _end_processes()


def kinds_alive(kinds: Mapping[str, int]) -> set[str]:
    """The kinds of the nodes that are there now."""
    import ray

    sizes = {node["Resources"].get("memory") for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    return {name for name, memory in kinds.items() if memory in sizes}


def processes_of_node(memory: int) -> list[psutil.Process]:
    """The processes of the nodes with so many bytes of memory: each Ray's own process, and all below it."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    sockets = {
        node["RayletSocketName"] for node in nodes if node["Alive"] and node["Resources"].get("memory") == memory
    }
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(f"--raylet_socket_name={name}" in process.cmdline() for name in sockets):
                found += [process, *process.children(recursive=True)]
        except psutil.Error:  # it has just ended
            continue
    return found


def _start_head(folder: Path, nodes: Mapping[str, Any], idle_seconds: float) -> str:
    """Start the head and its autoscaler. Returns the address."""
    address = f"{_LOOPBACK}:{_free_port()}"
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(_config(address, nodes, idle_seconds)))
    environment = {
        **os.environ,
        **_HEALTH,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        "RAY_NODE_TYPE_NAME": _HEAD,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--node-ip-address={_LOOPBACK}",
            f"--port={address.rpartition(':')[2]}", "--num-cpus=0", "--memory=0", f"--object-store-memory={_STORE_BYTES}",
            "--include-dashboard=false", "--include-log-monitor=false", "--disable-usage-stats",
            f"--autoscaling-config={config}", f"--temp-dir={folder}",
        ],
        env=environment, capture_output=True, text=True, timeout=_START_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"Ray's head did not start: {done.stderr[-2000:]}")
    return address


def _config(address: str, nodes: Mapping[str, Any], idle_seconds: float) -> dict[str, Any]:
    """The configuration of the autoscaler. Of the keys that are empty here Ray accepts none to be missing."""
    provider = {
        "type": "external",
        "module": "benchmarks.autoscaling_nodes.LocalNodes",
        "gcs_address": address,
        "head_node_id": _HEAD_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
    }
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "chainfed",
        "provider": provider,
        "max_workers": 2 * len(nodes),
        "idle_timeout_minutes": idle_seconds / 60,
        "head_node_type": _HEAD,
        "available_node_types": {
            _HEAD: {"resources": {}, "node_config": {}, "max_workers": 0},
            **nodes,
        },
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in commands},
    }


def _kind(name: str, memory: int, slot: str, slots: int) -> dict[str, Any]:
    return {
        "resources": {"CPU": 1, "memory": memory, "object_store_memory": _STORE_BYTES, slot: slots},
        "labels": {"chainfed.io/memory-class": name},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    }


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind((_LOOPBACK, 0))
        port: int = listening.getsockname()[1]
        return port


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _end_processes() -> None:
    """End every process below this one, each by its id. Those whose parent ends come to be children of this one."""
    for _ in range(_TRIES):
        below = psutil.Process().children(recursive=True)
        for process in below:
            with suppress(psutil.Error):  # it has ended
                process.kill()
        psutil.wait_procs(below, 10)
        if not below:
            return
