"""Nodes of a Ray cluster that are processes of this machine. Ray's autoscaler starts and ends them by demand, like pods.

Ray has such a provider for its own tests. It passes memory as a custom resource, which Ray refuses; this one passes it as
memory.
"""

from typing import Any

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from chainfed_ray.device import setup_worker


class LocalNodes(FakeMultiNodeProvider):
    """See Ray's ``NodeProvider``. The autoscaler's process imports it by name."""

    def _create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        custom: dict[str, Any] = dict(resources)
        with self.lock:
            name = str(self._next_hex_node_id())  # type: ignore[no-untyped-call]
            kind = tags[TAG_RAY_USER_NODE_TYPE]
            parameters = RayParams(
                min_worker_port=0,
                max_worker_port=0,
                dashboard_port=None,
                dashboard_agent_listen_port=0,
                include_log_monitor=False,  # type: ignore[arg-type]  # Ray takes a bool and says that it is text
                setup_worker_path=setup_worker.__file__,
                num_cpus=int(custom.pop("CPU", 0)),
                memory=custom.pop("memory"),
                object_store_memory=custom.pop("object_store_memory"),
                resources=custom,
                labels=labels,
                redis_address=self._gcs_address,
                gcs_address=self._gcs_address,
                env_vars={
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": name,
                    "RAY_CLOUD_INSTANCE_ID": name,
                    "RAY_NODE_TYPE_NAME": kind,
                },
            )
            node: Any = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
            own_tags = {
                TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                TAG_RAY_USER_NODE_TYPE: kind,
                TAG_RAY_NODE_NAME: name,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
            self._nodes[name] = {"tags": {**own_tags, **tags}, "node": node}
