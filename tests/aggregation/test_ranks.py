"""Promise: each rank of a LoRA is averaged over the clients that train it, whoever trains fewer."""

import itertools
from typing import Any

import pytest
import torch

from chainfed_ray.aggregation.aggregate import aggregate_by
from chainfed_ray.errors import InvalidJob
from chainfed_ray.model.adapters import Tensors, of_ranks
from chainfed_ray.spec.parse import parse_job
from chainfed_ray.spec.sections import AggregationSpec

A, B, HEAD = "adapters.2.query.lora_A.weight", "adapters.2.query.lora_B.weight", "head.linear.bias"
RANK = 4
CLIENTS = ((4, 30), (2, 10), (1, 7))  # how many ranks a client trains, and its examples


def tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {A: (RANK, 5), B: (6, RANK), HEAD: (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_mean_is_the_plain_computation_in_any_order() -> None:
    start = tensors(0)
    whole = [tensors(1 + place) for place in range(len(CLIENTS))]
    expected = {name: tensor.double() for name, tensor in start.items()}
    for rank in range(RANK):
        who = [(update, examples) for update, (ranks, examples) in zip(whole, CLIENTS, strict=True) if rank < ranks]
        total = sum(examples for _, examples in who)
        expected[A][rank] = sum(update[A][rank].double() * examples / total for update, examples in who)
        expected[B][:, rank] = sum(update[B][:, rank].double() * examples / total for update, examples in who)
    total = sum(examples for _, examples in CLIENTS)
    weighted = [update[HEAD].double() * examples / total for update, (_, examples) in zip(whole, CLIENTS, strict=True)]
    expected[HEAD] = torch.stack(weighted).sum(0)
    results = []
    for order in itertools.permutations(range(len(CLIENTS))):
        mean = aggregate_by(AggregationSpec(), start, total, by_rank=True)
        for place in order:
            ranks, examples = CLIENTS[place]
            update = of_ranks(whole[place], slice(ranks))
            assert mean.impossible(update) is None
            mean.add(place, update, examples)
        results.append(mean.result())
    for name, tensor in expected.items():
        torch.testing.assert_close(results[0][name].double(), tensor, rtol=0, atol=1e-6)
        assert all(torch.equal(result[name], results[0][name]) for result in results)


def test_ranks_that_nobody_trains_stay_as_they_were() -> None:
    start, update = tensors(0), of_ranks(tensors(1), slice(2))
    mean = aggregate_by(AggregationSpec(), start, 10, by_rank=True)
    mean.add(0, update, 10)
    found = mean.result()
    assert torch.equal(found[A][2:], start[A][2:])
    assert torch.equal(found[B][:, 2:], start[B][:, 2:])
    torch.testing.assert_close(found[A][:2], update[A])


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"chain": {"adapter": {"kind": "bottleneck"}}},
            "fleet.clients[0].rank is 2; expected no value with chain.adapter",
        ),
        ({"chain": {"adapter": {"kind": "lora", "rank": 1}}}, "fleet.clients[0].rank is 2; expected at most 1"),
        (
            {"aggregation": {"rule": "median"}},
            "fleet.clients[0].rank is 2; expected no value with aggregation.rule median",
        ),
        (
            {"privacy": {"clip": 1.0, "noise_multiplier": 1.0}},
            "fleet.clients[0].rank is 2; expected no value with privacy",
        ),
    ],
)
def test_where_a_rank_of_a_class_does_not_fit(sections: dict[str, Any], expected: str) -> None:
    document: dict[str, Any] = {
        "name": "ranks",
        "model": {"base": "builtin:smollm2", "task": "causal-lm"},
        "data": {"train": "builtin:docstrings"},
        "fleet": {"clients": [{"name": "phone", "count": 8, "memory": "64MiB", "rank": 2}]},
        "chain": {"adapter": {"kind": "lora"}},
    }
    with pytest.raises(InvalidJob) as caught:
        parse_job(document | sections)
    assert expected in str(caught.value)
    parse_job(document)
