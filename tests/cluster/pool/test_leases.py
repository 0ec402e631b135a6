"""Promises of the actors of a pool: of those that are free, a client gets the one beside its prefix cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.client.messages import Client
from chainfed_ray.cluster.pool.leases import Lease, Leases
from chainfed_ray.model.source import ModelSource

SOURCE = ModelSource(Path("model"), torch.float32, Path("scratch"))


@dataclass
class _Named:
    name: str
    client_class: str = "phone"
    remote: None = None


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
