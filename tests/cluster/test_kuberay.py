"""Promises of the manifests: KubeRay accepts them, and clients scale from zero by memory class."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from chainfed_ray.cluster.resources import CLIENT_SLOT, COORDINATOR_SLOT, IDLE_BYTES
from chainfed_ray.cluster.storage import Settings, Storage
from tests.project import ROOT

DOCUMENTS = list(yaml.safe_load_all((ROOT / "ray_cluster.yaml").read_text()))
SERVICE = next(document for document in DOCUMENTS if document["kind"] == "RayService")
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
GROUPS = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
CLIENTS = [group for name, group in GROUPS.items() if name.startswith("clients-")]
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def strict(schema: Any) -> Any:
    """Kubernetes' dialect of JSON schema as plain JSON schema, in which a misspelt key is an error."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    plain = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes") and key != "nullable"}
    if plain.get("format") in ("int32", "int64"):
        del plain["format"]
    if isinstance(plain.get("properties"), dict):
        properties = plain["properties"]
        plain["properties"] = {key: strict(value) for key, value in properties.items()}
        plain.setdefault("additionalProperties", False)
        needed = [key for key in plain.pop("required", []) if "default" not in properties.get(key, {})]
        return {**{k: v if k == "properties" else strict(v) for k, v in plain.items()}, "required": needed}
    return {key: strict(value) for key, value in plain.items()}


SCHEMA = strict(json.loads((ROOT / "tests/kuberay/rayservices.v1.schema.json").read_text()))
CHECKER = jsonschema.Draft202012Validator(SCHEMA)


def bytes_of(quantity: str) -> int:
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    only: dict[str, Any] = group["template"]["spec"]["containers"][0]
    return only


def test_kuberay_accepts_the_service() -> None:
    assert [f"{error.json_path}: {error.message}" for error in CHECKER.iter_errors(SERVICE)] == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda cluster: cluster.update(headGroupSpecs={}),
        lambda cluster: cluster["workerGroupSpecs"][0].update(minReplica=0),
        lambda cluster: cluster["workerGroupSpecs"][0].update(replicas="one"),
        lambda cluster: cluster["autoscalerOptions"].update(version="v3"),
        lambda cluster: cluster.pop("headGroupSpec"),
    ],
)
def test_the_schema_bites(spoil: Any) -> None:
    spoilt = copy.deepcopy(SERVICE)
    spoil(spoilt["spec"]["rayClusterConfig"])
    assert list(CHECKER.iter_errors(spoilt))


@pytest.mark.parametrize("group", CLIENTS, ids=lambda group: group["groupName"])
def test_clients_scale_from_zero_by_memory_class(group: dict[str, Any]) -> None:
    assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
    assert group["labels"]["chainfed.io/memory-class"] in group["groupName"]
    assert group["template"]["spec"]["restartPolicy"] == "Never"  # autoscaler v2 asks for it
    slots, memory = int(group["resources"][CLIENT_SLOT]), int(group["rayStartParams"]["memory"])
    assert COORDINATOR_SLOT not in group["resources"]
    assert memory // slots > IDLE_BYTES
    limits, requests = container(group)["resources"]["limits"], container(group)["resources"]["requests"]
    assert limits["memory"] == requests["memory"]
    store = int(group["rayStartParams"]["object-store-memory"])
    assert memory + store < bytes_of(limits["memory"])


def test_the_head_runs_nothing_of_ours() -> None:
    head = CLUSTER["headGroupSpec"]
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["memory"]) == ("0", "0")
    assert not head.get("resources")
    assert CLUSTER["authOptions"]["mode"] == "token"
    assert (CLUSTER["enableInTreeAutoscaling"], CLUSTER["autoscalerOptions"]["version"]) == (True, "v2")


def test_coordinators_have_a_place_that_stays() -> None:
    service = GROUPS["service"]
    jobs = next(item for item in container(service)["env"] if item["name"] == "CHAINFED_PARALLEL_JOBS")
    assert service["minReplicas"] >= 1
    assert int(service["resources"][COORDINATOR_SLOT]) * service["maxReplicas"] >= int(jobs["value"]) + 1


def test_every_pod_has_the_environment_that_the_code_reads(tmp_path: Path) -> None:
    read = set(Settings(Storage.at(tmp_path)).environment())
    for group in [CLUSTER["headGroupSpec"], *GROUPS.values()]:
        given = {item["name"] for item in container(group)["env"]}
        assert {name for name in given if name.startswith("CHAINFED_")} == read
        assert {"RAY_SERVE_ENABLE_HA_PROXY", "MALLOC_MMAP_THRESHOLD_"} <= given
        security = container(group)["securityContext"]
        assert security["allowPrivilegeEscalation"] is False


def test_serve_accepts_its_configuration() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["spec"]["serveConfigV2"]))
    application = config.applications[0]
    assert application.import_path == "chainfed_ray.api.serve.deployment:build"

    from chainfed_ray.api.serve.deployment import Api
    from chainfed_ray.api.serve.inference import Inference

    names = [deployment.name for deployment in application.deployments]
    assert names == [Api.name, Inference.name]  # type: ignore[attr-defined]


def test_the_image_has_every_package() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    packages = ["chainfed_ray", "api", "cluster"]  # the last two stand in the first as links
    for package in packages:
        assert f"COPY {package} {package}" in dockerfile
    assert ".py " not in dockerfile  # a file that is named is one to be forgotten
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".*", "chainfed-data"} <= set(ignored)
    assert not set(ignored) & {*packages, "examples"}


def test_with_an_object_store_no_volume_is_shared() -> None:
    """The overlay's patches, carried out as kustomize does."""
    overlay = yaml.safe_load((ROOT / "examples/kubernetes/s3/kustomization.yaml").read_text())
    gone, changed = overlay["patches"]
    assert yaml.safe_load(gone["patch"])["$patch"] == "delete"
    assert gone["target"] == {"kind": "PersistentVolumeClaim", "name": "chainfed-storage"}
    assert changed["target"] == {"kind": "RayService", "name": "chainfed"}
    service = copy.deepcopy(json.loads(json.dumps(SERVICE)))  # without what YAML's anchors share
    for patch in yaml.safe_load(changed["patch"]):
        *path, last = patch["path"].split("/")[1:]
        place: Any = service
        for part in path:
            place = place[int(part) if isinstance(place, list) else part]
        if patch["op"] == "remove":
            assert place.pop(int(last))["name"] == "CHAINFED_STORAGE"
        else:
            assert (patch["op"] == "add") == (isinstance(place, dict) and last not in place), patch
            place[int(last) if isinstance(place, list) else last] = patch["value"]
    assert [f"{error.json_path}: {error.message}" for error in CHECKER.iter_errors(service)] == []
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod, names = group["template"]["spec"], [one["name"] for one in container(group)["env"]]
        assert not [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        assert container(group)["envFrom"] == [{"secretRef": {"name": "chainfed-s3"}}]
        assert "CHAINFED_CACHE" in names
        assert "CHAINFED_STORAGE" not in names, "the secret has it"
