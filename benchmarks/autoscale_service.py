"""``python -m benchmarks autoscale --service``: a cluster follows the jobs of the service that runs on it.

The service is its Ray Serve application and its controller, on a node of a kind of its own; HAProxy is not part of it. No
process that answers with models is there before somebody asks one.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch

from benchmarks.autoscale_cell import KINDS, MIB
from benchmarks.autoscaling_cluster import autoscaling_cluster, in_a_tree_of_its_own, kinds_alive
from benchmarks.cell_process import Row
from benchmarks.plan import word_tokenizer
from benchmarks.scale_cell import MODEL, write_rows
from benchmarks.shapes import written
from chainfed_ray.api.command.local_service import free_port
from chainfed_ray.api.sdk import calls
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.errors import ChainFedError

_SERVICE = {"service": 6000 * MIB}
_CLASSES = {"phone": "64MiB", "laptop": "512MiB", "server": "1536MiB"}
_PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 0.2


def main(times: int, idle_seconds: float) -> list[Row]:
    """Start the service, and submit a job over REST, ``times``, from no node for clients each time."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, written(MODEL, Path(scratch)) as base:
        assert isinstance(base, Path), base
        word_tokenizer().save_pretrained(base)
        os.environ |= {
            "CHAINFED_STORAGE": str(base / "storage"),
            "CHAINFED_DATA_ROOTS": str(base),
            "CHAINFED_MODEL_ROOTS": str(base),
            "CHAINFED_SERVING_LEAST_REPLICAS": "0",
            "CHAINFED_CLIENT_SLOTS": "3",
            "CHAINFED_WITHOUT_KEYS": "loopback",
        }
        with autoscaling_cluster(KINDS, idle_seconds, _SERVICE), closing(_service()) as client:
            _until(monotonic(), lambda: not kinds_alive(KINDS), "cluster with the service alone")
            return [_followed(client, base) for _ in range(times)]


def _service() -> Client:
    """Start the service. Gives a client of it, once each of its parts works."""
    from ray import serve

    from chainfed_ray.api.serve.deployment import build

    port = free_port("127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
    serve.run(build({}), name="chainfed", route_prefix="/")
    client = Client(f"http://127.0.0.1:{port}")
    _until(monotonic(), lambda: _is_ready(client), "service that is ready")
    return client


def _is_ready(client: Client) -> bool:
    try:
        return {*client.send(calls.readyz()).checks.values()} == {"ok"}
    except ChainFedError:
        return False


def _followed(client: Client, base: Path) -> Row:
    """What the cluster does for a job: the seconds until it has a node of each kind, and until none is left."""
    began = monotonic()
    job = client.json(calls.submit_job(_document(base)))["id"]
    seen, first = set[str](), 0.0
    while (record := client.json(calls.get_job(job)))["finished_at"] is None:
        seen |= kinds_alive(KINDS)
        first = first or (monotonic() - began if seen else 0.0)
        if monotonic() - began > _PATIENCE_SECONDS:
            raise TimeoutError(f"job {job} is {record['status']}: {record['activity']}")
        sleep(_POLL_SECONDS)
    assert record["status"] == "succeeded", record["error"]
    ended = monotonic()
    assert seen == KINDS.keys(), seen
    gone = _until(ended, lambda: not kinds_alive(KINDS), "cluster with the service alone")
    return {"first_seconds": first, "job_seconds": ended - began, "gone_seconds": gone, "left": _processes()}


def _processes() -> dict[str, int]:
    """How many actors there are of each class, by its name, and where."""
    import ray
    from ray._private.state import actors

    kinds = {
        node["NodeID"]: next((name for name, memory in _SERVICE.items() if node["Resources"].get("memory") == memory), "head")
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    }  # fmt: skip
    alive = actors(actor_state_name="ALIVE").values()
    return dict(Counter(f"{actor['ActorClassName']} on {kinds[actor['Address']['NodeID']]}" for actor in alive))


def _until(began: float, condition: Callable[[], bool], what: str) -> float:
    """Wait for a condition, and give the seconds since ``began``."""
    while not condition():
        if monotonic() - began > _PATIENCE_SECONDS:
            raise TimeoutError(f"no {what} within {_PATIENCE_SECONDS:g} s: {_processes()}")
        sleep(_POLL_SECONDS)
    return monotonic() - began


def _document(base: Path) -> dict[str, Any]:
    write_rows(base / "train.jsonl", 48)
    write_rows(base / "held-out.jsonl", 16)
    held_out = f"path:{base / 'held-out.jsonl'}"
    return {
        "name": "autoscale",
        "model": {"base": f"path:{base}"},
        "data": {
            "train": f"path:{base / 'train.jsonl'}", "validation": held_out, "test": held_out, "max_length": MODEL.tokens,
        },
        "fleet": {
            "partition": {"scheme": "iid"},
            "clients": [{"name": name, "memory": memory} for name, memory in _CLASSES.items()],
        },
        "chain": {"window": 2, "start": 2, "head": "zero"},
        "rounds": {"total": 3, "clients": 3, "quorum": 3, "convergence": {"rule": "none"}},
    }  # fmt: skip


if __name__ == "__main__":
    in_a_tree_of_its_own()
    print(json.dumps({"rows": main(**json.loads(sys.argv[1]))}))
