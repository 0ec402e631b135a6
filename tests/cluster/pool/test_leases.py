"""Promises of the actors of a pool: a client gets the free one beside its prefix cache, and there are those that are needed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.client.messages import Client
from chainfed_ray.client.pool import Need
from chainfed_ray.cluster.pool.leases import Lease, Leases
from chainfed_ray.cluster.resources import IDLE_BYTES
from chainfed_ray.model.source import ModelSource

SOURCE = ModelSource(Path("model"), torch.float32, Path("scratch"))


@dataclass
class _Named:
    name: str
    client_class: str = "phone"
    budget_bytes: int = 1
    remote: None = None


class _Made:
    """Stands for Ray: knows the bytes that each actor asked for which was made, and which of them were ended."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.ended = 0

    def options(self, memory: int, **_: Any) -> Self:
        self.asked.append(memory - IDLE_BYTES)
        return self

    def remote(self, *_: Any) -> Self:
        return self

    @property
    def prepare(self) -> Self:
        return self

    @property
    def node(self) -> Self:
        return self

    def kill(self, _: Any) -> None:
        self.ended += 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> _Made:
    ray = _Made()
    monkeypatch.setattr("chainfed_ray.cluster.pool.leases.ClientActor", ray)
    monkeypatch.setattr("ray.kill", ray.kill)
    monkeypatch.setattr("ray.wait", lambda references, timeout: ([], references))  # none has started
    return ray


def _client(name: str) -> Client:
    return cast(Client, _Named(name))


def _on(node: str) -> Lease:
    """An actor that has started on a machine."""
    return Lease(actor=None, client_class="phone", memory=0, ready=None, placed=True, known_node=node)


@given(st.permutations("xyz"))
def test_a_client_gets_the_free_actor_on_the_machine_of_its_last_turn(order: list[str]) -> None:
    leases = Leases(SOURCE, slots=3)
    for node in "xyz":
        leases.give_back(_on(node), _client(f"of {node}"))
    for node in order:
        lease = leases.lease(_client(f"of {node}"), {})
        assert lease is not None
        assert lease.node == node


def test_a_client_takes_another_actor_rather_than_wait() -> None:
    leases = Leases(SOURCE, slots=1)
    leases.give_back(_on("x"), _client("first"))
    lease = leases.lease(_client("first"), {})
    assert lease is not None
    leases.give_back(_on("y"), _client("second"))
    other = leases.lease(_client("first"), {})
    assert other is not None
    assert other.node == "y"
    assert [leases.loss(_client(name), other) for name in ("first", "second", "new")] == [2, 0, 1]
    leases.give_back(other, _client("first"))
    assert leases.loss(_client("first"), other) == 0, "now its cache is there"


def test_what_the_next_round_needs_is_made_ahead_as_far_as_there_are_places(made: _Made) -> None:
    leases = Leases(SOURCE, slots=4)
    leases.make_ahead([Need("phone", 1, 9), Need("server", 7, 1)])
    assert made.asked == [1, 7, 1, 1], "one of each class first"
    leases.make_ahead([Need("phone", 1, 9), Need("server", 7, 1)])
    assert len(made.asked) == 4
    lease = leases.lease(_client("any"), {})
    assert lease is not None
    assert len(made.asked) == 4, "the next round takes it"


def test_what_the_job_needs_no_more_is_ended_and_nothing_else(made: _Made) -> None:
    leases = Leases(SOURCE, slots=3)
    leases.make_ahead([Need("phone", 1, 2), Need("server", 7, 1)])
    leases.let_go([Need("phone", 1, 1)])
    assert not made.ended, "a class that is not needed in the next round may be in the one after"
    leases.let_go([])
    assert made.ended == 3
    leases.make_ahead([Need("server", 7, 3)])
    assert made.asked[3:] == [7, 7, 7], "its places are free again"


def test_an_actor_is_ended_when_its_class_was_not_needed_for_a_while(
    made: _Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases, now = Leases(SOURCE, slots=2), 0.0
    monkeypatch.setattr("chainfed_ray.cluster.pool.leases.monotonic", lambda: now)
    leases.make_ahead([Need("phone", 1, 1), Need("server", 7, 1)])
    now = 3600.0
    leases.let_go([Need("phone", 1, 1)])
    assert made.ended == 1
    assert leases.lease(_client("any"), {}) is not None
    assert len(made.asked) == 2, "that of the class that is needed"


def test_no_client_waits_for_the_machine_of_its_cache(made: _Made) -> None:
    """An actor that was made ahead has no machine yet; one that runs elsewhere is there at once."""
    leases = Leases(SOURCE, slots=2)
    leases.give_back(_on("x"), _client("of x"))
    leases.give_back(_on("y"), _client("of y"))
    first = leases.lease(_client("of x"), {})
    assert first is not None
    leases.make_ahead([Need("phone", 3, 1)])
    second = leases.lease(_client("of x"), {})
    assert second is not None
    assert second.known_node == "y"


def test_the_free_actors_of_a_lost_machine_are_forgotten(made: _Made) -> None:
    leases = Leases(SOURCE, slots=4)
    for node in ("x", "x", "y", "x"):
        leases.give_back(_on(node), _client("of x"))
    leases.lose("x")
    assert made.ended == 3
    left = leases.lease(_client("of x"), {})
    assert left is not None
    assert left.known_node == "y"
