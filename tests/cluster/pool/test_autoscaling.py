"""Promises of a cluster that grows and shrinks with what the chain needs. Its nodes are processes of this machine."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any, cast

import pytest
import torch
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.exceptions import RpcError

from chainfed_ray.client.messages import Client, Profile, Profiling
from chainfed_ray.client.pool import Failure
from chainfed_ray.cluster.pool.autoscaler import is_growing, never_met, never_met_by
from chainfed_ray.cluster.pool.ray_pool import RayPool
from chainfed_ray.cluster.resources import IDLE_BYTES
from chainfed_ray.model.source import ModelSource
from tests.builders import MIB, a_document
from tests.project import ROOT

_SECONDS = 400  # a machine that does other things as well takes two minutes


@pytest.fixture(scope="module")
def seen(
    tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What was seen of two jobs, one after the other on one cluster that begins as its head alone."""
    given = {
        "document": a_document(tiny_model_folder, tiny_data),
        "folder": str(tmp_path_factory.mktemp("autoscaling")),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.autoscaling", json.dumps(given)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        answer, errors = process.communicate(timeout=_SECONDS)
        assert process.returncode == 0, errors[-4000:]
        yield json.loads(answer.splitlines()[-1])
    finally:
        if process.poll() is None:
            process.terminate()  # it ends the cluster
            process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(_SECONDS)
def test_three_classes_of_clients_bring_three_kinds_of_nodes_and_then_the_head_is_alone(seen: dict[str, Any]) -> None:
    assert seen["before"] == []
    assert seen["kinds"] == ["large", "medium", "small"]
    assert seen["after"] == []


@pytest.mark.slow
def test_a_node_that_is_lost_in_a_round_costs_no_turn_and_changes_no_bit(seen: dict[str, Any]) -> None:
    assert seen["lost"] == {"same": True, "failed": []}


@pytest.mark.slow
def test_clients_that_no_node_can_hold_are_told_and_not_waited_for(seen: dict[str, Any]) -> None:
    unmet = seen["unmet"]
    assert unmet["status"] == "succeeded", "the quorum holds without them"
    kinds = [kind for kind, _ in unmet["events"]]
    assert kinds.index("no_machine") < kinds.index("round"), "while the round runs"
    assert kinds.count("no_machine") == 1
    told = next(data for kind, data in unmet["events"] if kind == "no_machine")
    assert (told["client_class"], told["budget_bytes"]) == ("giant", 100 * 2**30)
    assert told["reason"].startswith(
        "no machine that the cluster has or can add has the 100GiB that a client of class giant"
    )
    assert any(told["reason"] in note for note in unmet["notes"])
    failed = [turn for kind, data in unmet["events"] if kind == "round" for turn in data["failed_turns"]]
    assert [turn["client"] for turn in failed] == ["giant-0"] * 3
    assert {turn["reason"] for turn in failed} == {told["reason"]}


def a_status(infeasible: list[int], waiting: dict[int, int]) -> GetClusterStatusReply:
    """Ray's answer: the MiB of each request that is infeasible, and how many of each wait."""
    status = GetClusterStatusReply()
    for memory in infeasible:
        bundle = status.autoscaling_state.infeasible_resource_requests.add().resources_bundle
        bundle["memory"], bundle["client_slot"] = memory * MIB, 1
    for memory, count in waiting.items():
        pending = status.cluster_resource_state.pending_resource_requests.add(count=count)
        pending.request.resources_bundle["memory"] = memory * MIB
        pending.request.resources_bundle["client_slot"] = 1
    return status


def test_a_request_is_never_met_if_none_like_it_has_a_machine_on_its_way() -> None:
    assert never_met_by(a_status([900], {900: 1, 500: 2}), largest=600 * MIB) == {900 * MIB}
    assert never_met_by(a_status([900], {900: 2}), largest=0) == set(), "its group is at its limit, and a machine comes"
    assert never_met_by(a_status([900], {900: 1}), largest=900 * MIB) == set(), "all such machines are in use"
    assert never_met_by(a_status([], {900: 1}), largest=0) == set()


def test_requests_that_are_not_for_clients_are_not_ours_to_judge() -> None:
    status = a_status([], {})
    status.autoscaling_state.infeasible_resource_requests.add().resources_bundle["CPU"] = 64
    assert never_met_by(status, largest=0) == set()


class _Head:
    """Ray's head as the pool sees it: it gives an answer, or does not."""

    def __init__(self, answer: GetClusterStatusReply | None) -> None:
        self._answer = answer

    def get_cluster_status(self, timeout_s: float) -> bytes:
        if self._answer is None:
            raise RpcError("no answer within 2 s")
        said: bytes = self._answer.SerializeToString()
        return said


@pytest.mark.parametrize(("infeasible", "found"), [([900], {900 * MIB}), (None, set())])
def test_what_the_head_says_is_known_and_a_head_that_does_not_answer_says_nothing(
    infeasible: list[int] | None, found: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = _Head(None if infeasible is None else a_status(infeasible, {900: 1}))
    monkeypatch.setattr("chainfed_ray.cluster.pool.autoscaler.internal_kv_get_gcs_client", lambda: head)
    monkeypatch.setattr("ray.nodes", list)
    assert never_met() == found
    assert not is_growing()


def test_a_machine_that_is_being_added_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    status = a_status([], {900: 1})
    status.autoscaling_state.pending_instances.add(ray_node_type_name="large")
    monkeypatch.setattr("chainfed_ray.cluster.pool.autoscaler.internal_kv_get_gcs_client", lambda: _Head(status))
    assert is_growing()


class _Actor:
    """Stands for each actor, each of its methods, and Ray's references to their results. It has no machine until ``comes``."""

    def __init__(self, comes: float) -> None:
        self.now = self.began = monotonic()
        self._comes = self.began + comes

    def __getattr__(self, name: str) -> "_Actor":
        if name.startswith("_") and name != "_actor_id":
            raise AttributeError(name)
        return self

    def __call__(self, *_: object, **__: object) -> "_Actor":
        return self

    def wait(self, references: list[object], timeout: float, **_: object) -> tuple[list[object], list[object]]:
        """Stands for ``ray.wait``. What waits takes all of its time."""
        self.now += timeout
        return (references, []) if self.now >= self._comes else ([], references)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "taken", "added", "waits"),
    [
        (0, 0, False, False),
        (0, 0, True, True),
        (2**40, 1, False, True),
        (2**40, 0, False, False),
        (2**20, 1, False, False),
    ],
    ids=["none", "one is being added", "a large one with clients", "a large one with others", "a small one"],
)
def test_a_turn_without_a_deadline_waits_for_a_machine_as_long_as_there_may_be_one(
    machine: int, taken: int, added: bool, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = a_status([], {(IDLE_BYTES + _Phone.budget_bytes) // MIB: 1})
    if added:
        status.autoscaling_state.pending_instances.add(ray_node_type_name="large")
    monkeypatch.setattr("chainfed_ray.cluster.pool.autoscaler.internal_kv_get_gcs_client", lambda: _Head(status))
    resources = {"memory": machine, "client_slot": 1}
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": "n", "Alive": True, "Resources": resources}])
    monkeypatch.setattr("chainfed_ray.cluster.pool.leases.actors", lambda actor: {})
    others = {str(place): {"ActorClassName": "ClientActor"} for place in range(taken)}
    monkeypatch.setattr("chainfed_ray.cluster.pool.autoscaler.actors", lambda actor_state_name: others)
    actor = _Actor(comes=3600)
    monkeypatch.setattr("chainfed_ray.cluster.pool.leases.ClientActor", actor)
    for module in ("ray_pool", "leases", "unmet"):
        monkeypatch.setattr(f"chainfed_ray.cluster.pool.{module}.monotonic", lambda: actor.now)
    monkeypatch.setattr("ray.put", lambda order: order)
    monkeypatch.setattr("ray.kill", lambda actor: None)
    monkeypatch.setattr("ray.wait", actor.wait)
    monkeypatch.setattr("ray.get", lambda reference, timeout=None: Profile((1.0,), 1, 0.0))
    pool = RayPool(ModelSource(Path("model"), torch.float32, Path("scratch")), slots=1)
    (outcome,) = pool.run([cast(Client, _Phone())], Profiling(8, 0), math.inf)
    waited = actor.now - actor.began
    assert (3600 if waits else 300) <= waited < (3610 if waits else 310)
    if waits:
        assert isinstance(outcome.result, Profile)
    else:
        assert isinstance(outcome.result, Failure)
        assert outcome.result.reason.startswith("nothing happened for 300 s: no machine with ")


class _Phone:
    """What the pool needs of a client."""

    name, client_class, budget_bytes, remote = "phone-0", "phone", 500 * MIB, None
