"""Promises of the queue in front of the actors: the first in line is the next, and a look costs what starts."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.client.messages import Client
from chainfed_ray.cluster.pool.waiting import Waiting


@dataclass
class _Named:
    client_class: str


def _clients(names: list[str]) -> list[tuple[int, Client]]:
    return [(place, cast(Client, _Named(name))) for place, name in enumerate(names)]


class _Actors:
    """Gives as many actors of a class as are ``free``, and counts how often it is asked."""

    def __init__(self, free: Mapping[str, int]) -> None:
        self.free, self.asked = Counter(free), 0
        self.others: list[Mapping[str, int]] = []

    def lease(self, client: Client, others: Mapping[str, int]) -> str | None:
        self.asked += 1
        self.others.append(dict(others))
        if not self.free[client.client_class]:
            return None
        self.free[client.client_class] -= 1
        return client.client_class


@given(st.lists(st.sampled_from("abc")), st.dictionaries(st.sampled_from("abc"), st.integers(0, 4)))
def test_who_can_start_does_so_in_the_order_of_places(names: list[str], free: dict[str, int]) -> None:
    waiting, actors = Waiting(_clients(names)), _Actors(free)
    started = [place for place, _, _ in waiting.startable(actors.lease)]
    first = {name: [place for place, other in enumerate(names) if other == name][: free.get(name, 0)] for name in "abc"}
    assert started == sorted(place for places in first.values() for place in places)
    assert waiting.places() == [place for place in range(len(names)) if place not in started]
    assert bool(waiting) == (len(started) < len(names))
    assert actors.asked <= len(started) + len(set(names)), "one question for each class that has to wait"


def test_the_others_that_wait_are_counted_without_the_one_that_is_next() -> None:
    waiting, actors = Waiting(_clients(["a", "b", "a"])), _Actors({})
    assert not list(waiting.startable(actors.lease))
    assert actors.others == [{"a": 1, "b": 1}, {"a": 2, "b": 0}]


def test_who_has_to_begin_anew_is_the_next_of_its_class() -> None:
    waiting, actors = Waiting(_clients(["a", "b", "a"])), _Actors({"a": 1})
    ((place, client, _),) = waiting.startable(actors.lease)
    waiting.again(place, client)
    assert waiting.places() == [0, 1, 2]
    actors.free["a"] = 1
    assert [place for place, _, _ in waiting.startable(actors.lease)] == [0]


@given(st.lists(st.sampled_from("xyz"), max_size=12), st.lists(st.sampled_from("xyz"), max_size=12))
def test_an_actor_goes_to_a_client_whose_cache_is_on_its_machine_if_one_waits(
    homes: list[str], free: list[str]
) -> None:
    clients, actors = _clients(["a"] * len(homes)), list(free)
    home = {id(client): homes[place] for place, client in clients}
    waiting, left = Waiting(clients), dict(enumerate(homes))
    for place, _, machine in waiting.startable(
        lambda client, others: actors.pop() if actors else None, lambda client, machine: home[id(client)] != machine
    ):
        at_home = [other for other, where in left.items() if where == machine]
        assert place == min(at_home or left)
        del left[place]
    assert len(left) == max(len(homes) - len(free), 0), "nobody waits for that"
    assert waiting.places() == list(left)


def test_a_class_is_taken_out_as_a_whole() -> None:
    waiting, actors = Waiting(_clients(["a", "b", "a"])), _Actors({"a": 2, "b": 1})
    assert [client.client_class for client in waiting.first_of_each()] == ["a", "b"]
    assert [place for place, _ in waiting.take("a")] == [0, 2]
    assert waiting.take("a") == []
    assert [place for place, _, _ in waiting.startable(actors.lease)] == [1]
    assert not waiting


@pytest.mark.parametrize("count", [100, 800])
def test_what_dispatch_costs_grows_with_the_clients_and_no_faster(count: int) -> None:
    """Eight actors, each of which is free again after its turn: with every turn that ends, one starts."""
    classes = "abcd"
    waiting = Waiting(_clients([classes[place % 4] for place in range(count)]))
    actors = _Actors(dict.fromkeys(classes, 2))
    running: list[Any] = list(waiting.startable(actors.lease))
    started = len(running)
    while running:
        _, _, name = running.pop(0)
        actors.free[name] += 1
        new = list(waiting.startable(actors.lease))
        started += len(new)
        running += new
    assert started == count
    assert not waiting
    assert actors.asked <= count * (1 + len(classes))
