"""Promises of aggregation: each rule is what its paper says, over the updates that have a tensor; poison does not move it."""

import re
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.aggregation.aggregate import Aggregate, KeptUpdates, aggregate_by
from chainfed_ray.aggregation.mean import RunningMean
from chainfed_ray.aggregation.robust import krum, median, trimmed_mean
from chainfed_ray.aggregation.rule import WeightedUpdate
from chainfed_ray.errors import InvalidJob
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.spec.parse import parse_job, parse_yaml
from chainfed_ray.spec.sections import AggregationSpec
from tests.project import ROOT

_SHAPES = {"adapters.1.up": (3, 2), "adapters.2.up": (4,), "adapters.3.up": (2, 2), "head": (5,)}
_START = {name: torch.zeros(shape) for name, shape in _SHAPES.items()}


@st.composite
def rounds_of_updates(draw: st.DrawFn, fewest: int = 1, most: int = 9) -> list[WeightedUpdate]:
    """Updates of clients whose windows have one top and different widths: each has the last so many tensors."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    widths = draw(st.lists(st.integers(1, len(_SHAPES)), min_size=fewest, max_size=most))
    return [
        (
            {name: torch.randn(shape, generator=generator) for name, shape in list(_SHAPES.items())[-width:]},
            draw(st.integers(1, 99)),
        )
        for width in widths
    ]


def values_of(updates: list[WeightedUpdate], name: str) -> np.ndarray:
    """What was sent of a tensor, [n, …], in float64."""
    return np.stack([tensors[name].double().numpy() for tensors, _ in updates if name in tensors])


def names_of(updates: list[WeightedUpdate]) -> set[str]:
    return {name for tensors, _ in updates for name in tensors}


def assert_is(result: Tensors, expected: dict[str, np.ndarray]) -> None:
    assert result.keys() == expected.keys()
    for name, tensor in result.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.slow
@given(rounds_of_updates())
def test_the_mean_is_over_those_that_sent_a_tensor(updates: list[WeightedUpdate]) -> None:
    mean = aggregate_by(AggregationSpec(), _START, sum(examples for _, examples in updates))
    for place, (tensors, examples) in enumerate(updates):
        mean.add(place, tensors, examples)
    weights = {name: [examples for tensors, examples in updates if name in tensors] for name in names_of(updates)}
    expected = {name: np.average(values_of(updates, name), 0, weights[name]) for name in weights}
    assert_is(mean.result(), expected)


@pytest.mark.slow
@given(rounds_of_updates())
def test_the_median_is_numpys(updates: list[WeightedUpdate]) -> None:
    assert_is(median(updates), {name: np.median(values_of(updates, name), 0) for name in names_of(updates)})


@pytest.mark.slow
@given(rounds_of_updates(), st.sampled_from([0, 0.07, 0.1, 0.2, 0.25, 1 / 3, 0.4, 0.49]))
def test_the_trimmed_mean_cuts_its_share_at_each_end(updates: list[WeightedUpdate], trim: float) -> None:
    expected = {}
    for name in names_of(updates):
        ordered = np.sort(values_of(updates, name), 0)
        wanted = next(cut for cut in range(len(ordered) + 1) if cut >= trim * len(ordered) - 1e-9)
        cut = min(wanted, (len(ordered) - 1) // 2)
        expected[name] = ordered[cut : len(ordered) - cut].mean(0)
    assert_is(trimmed_mean(updates, trim), expected)


@pytest.mark.parametrize(
    ("count", "trim", "left"), [(100, 0.07, 86), (30, 0.1, 24), (5, 0.1, 3), (2, 0.4, 2), (1, 0.4, 1)]
)
def test_a_share_is_whole_updates(count: int, trim: float, left: int) -> None:
    """Rounded up, but something is left: of squares, whose mean tells how many were cut."""
    squares: list[WeightedUpdate] = [({"x": torch.tensor([float(place**2)])}, 1) for place in range(count)]
    kept = [place**2 for place in range((count - left) // 2, (count + left) // 2)]
    assert trimmed_mean(squares, trim)["x"].item() == pytest.approx(sum(kept) / left)


@pytest.mark.slow
@given(rounds_of_updates(fewest=5), st.data())
def test_outliers_move_neither_median_nor_trimmed_mean(updates: list[WeightedUpdate], data: st.DataObject) -> None:
    """However large they are: with a fifth of the updates poisoned, each value stays within those of the others."""
    updates = [({"head": tensors["head"]}, examples) for tensors, examples in updates]
    poisoned = data.draw(st.integers(0, len(updates) - 1))
    sign = data.draw(st.sampled_from([-1.0, 1.0]))
    bad = [
        ({"head": torch.full((5,), sign * 1e30)}, 1) if place == poisoned else update
        for place, update in enumerate(updates)
    ]
    honest = values_of([update for place, update in enumerate(bad) if place != poisoned], "head")
    for result in (median(bad), trimmed_mean(bad, 0.2)):
        assert (result["head"].numpy() >= honest.min(0).astype(np.float32)).all()
        assert (result["head"].numpy() <= honest.max(0).astype(np.float32)).all()


def krum_by_definition(vectors: np.ndarray, byzantine: int) -> int:
    """The place of the update whose n − f − 2 nearest others are the nearest; every choice of others is tried."""
    count = len(vectors)
    scores = [
        min(
            sum(((vectors[place] - vectors[other]) ** 2).sum() for other in others)
            for others in combinations([other for other in range(count) if other != place], count - byzantine - 2)
        )
        for place in range(count)
    ]
    return int(np.argmin(scores))


@pytest.mark.slow
@given(rounds_of_updates(fewest=3), st.integers(0, 3))
def test_krum_is_its_definition(updates: list[WeightedUpdate], byzantine: int) -> None:
    result = krum(updates, byzantine)
    for name in _SHAPES:
        senders = [tensors for tensors, _ in updates if name in tensors]
        if len(senders) < 2 * byzantine + 3:
            assert name not in result
            continue
        shared = [other for other in _SHAPES if all(other in tensors for tensors in senders)]
        vectors = np.stack(
            [torch.cat([tensors[other].flatten() for other in shared]).double().numpy() for tensors in senders]
        )
        assert torch.equal(result[name], senders[krum_by_definition(vectors, byzantine)][name])


@pytest.mark.slow
@given(rounds_of_updates(fewest=5, most=7), st.data())
def test_krum_rejects_a_poisoned_update(updates: list[WeightedUpdate], data: st.DataObject) -> None:
    """Wherever it is, however often it claims to have trained, and in whichever tensor the poison lies."""
    poisoned = data.draw(st.integers(0, len(updates) - 1))
    name = data.draw(st.sampled_from(list(updates[poisoned][0])))
    bad, _ = updates[poisoned]
    updates[poisoned] = ({**bad, name: bad[name] + 100}, 10**9)
    result = krum(updates, 1)
    assert "head" in result, "all sent it"
    assert all(tensor.abs().max() < 50 for tensor in result.values())


def test_krum_takes_one_update_whole_and_copies_it() -> None:
    updates: list[WeightedUpdate] = [
        ({"a": torch.full((2,), float(at)), "b": torch.tensor([at])}, 1) for at in (0, 4, 5, 6, 9)
    ]
    result = krum(updates, 1)
    assert (result["a"].tolist(), result["b"].tolist()) == ([5, 5], [5])
    equals: list[WeightedUpdate] = [({"a": torch.zeros(1)}, 1)] * 3
    assert krum(equals, 0)["a"].item() == 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum"])
@given(updates=rounds_of_updates(fewest=5))
def test_these_rules_are_unweighted(rule: Any, updates: list[WeightedUpdate]) -> None:
    spec = AggregationSpec(rule=rule, trim=0.3)
    claimed, same = aggregate_by(spec, _START, 1), aggregate_by(spec, _START, 1)
    for place, (tensors, examples) in enumerate(updates):
        claimed.add(place, tensors, examples)
        same.add(place, tensors, 1)
    assert_same(claimed.result(), same.result())


def assert_same(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed-mean", "krum"])
def test_an_update_that_goes_too_far_is_refused_in_words(rule: Any) -> None:
    """By every rule: two numbers at the edge of float32 have a sum and a difference that are no numbers."""
    start = {"a": torch.zeros(2), "b": torch.ones(2)}
    aggregate = aggregate_by(AggregationSpec(rule=rule), start, 10)
    assert aggregate.impossible({"a": torch.full((2,), 256.0), "b": torch.full((2,), -255.0)}) is None
    words = "b changed by {}, and changes of at most 256 are taken"
    assert aggregate.impossible({"b": torch.tensor([0.0, 300.0])}) == words.format(299)
    edge = torch.finfo(torch.float32).max
    assert aggregate.impossible({"b": torch.tensor([0.0, -edge])}) == words.format("3.4e+38")


def test_only_the_mean_runs() -> None:
    """One update in memory at a time, unless the rule has to look at all."""
    kinds: dict[str, type[Aggregate]] = {
        rule: type(aggregate_by(AggregationSpec(rule=rule), _START, 1))  # type: ignore[arg-type]
        for rule in ("mean", "median", "trimmed-mean", "krum")
    }
    assert kinds == {"mean": RunningMean} | dict.fromkeys(("median", "trimmed-mean", "krum"), KeptUpdates)


@pytest.mark.parametrize(
    ("aggregation", "rounds", "field"),
    [
        ({"rule": "krum"}, {"clients": 4}, "rounds.clients"),
        ({"rule": "krum", "byzantine": 2}, {"clients": 6}, "rounds.clients"),
        ({"rule": "krum"}, {"clients": 6, "quorum": 4}, "rounds.quorum"),
        ({"rule": "krum"}, {"clients": 9}, "rounds.clients"),
        ({"rule": "average"}, {}, "aggregation.rule"),
        ({"trim": 0.5}, {}, "aggregation.trim"),
        ({"beta1": 1.0}, {}, "aggregation.beta1"),
        ({"tau": 0.0}, {}, "aggregation.tau"),
        ({"proximal": -0.1}, {}, "aggregation.proximal"),
        ({"server_learning_rate": float("nan")}, {}, "aggregation.server_learning_rate"),
        ({"mu": 0.1}, {}, "aggregation.mu"),
        ({"server_learning_rate": 0.1}, {}, "aggregation.server_learning_rate"),
    ],
)
def test_wrong_aggregation(
    document: dict[str, Any], aggregation: dict[str, Any], rounds: dict[str, Any], field: str
) -> None:
    document["fleet"]["clients"][0]["count"] = 8
    document |= {"aggregation": aggregation}
    document["rounds"] |= rounds
    with pytest.raises(InvalidJob) as caught:
        parse_job(document)
    assert [problem.field for problem in caught.value.problems] == [field]


def test_krum_says_how_many_clients_would_do(document: dict[str, Any]) -> None:
    document["aggregation"] = {"rule": "krum", "byzantine": 2}
    with pytest.raises(InvalidJob, match=r"rounds\.clients is 3; expected at least 7: Krum needs 2f \+ 3 .* f is 2"):
        parse_job(document)
    document["fleet"]["clients"][0]["count"] = 9
    document["rounds"]["clients"] = 9
    assert parse_job(document).quorum == 7, "half of nine would not do"


def test_every_job_in_the_documentation_is_one() -> None:
    jobs = re.findall(r"```yaml\n(name: .*?)```", (ROOT / "docs" / "aggregation.md").read_text(), re.DOTALL)
    assert jobs
    for job in jobs:
        parse_yaml(job)


@pytest.mark.parametrize(("key", "value"), [("head", "fitted"), ("start", "auto")])
def test_what_one_client_can_spoil_is_refused_with_a_robust_rule(
    key: str, value: str, document: dict[str, Any]
) -> None:
    document["aggregation"] = {"rule": "median"}
    parse_job(document)
    document["chain"][key] = value
    with pytest.raises(InvalidJob, match=f"chain.{key}"):
        parse_job(document)
