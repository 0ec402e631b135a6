"""Promises of sums as integers: the same bits in any order and in parts, no overflow, an error within the stated bound."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.aggregation.fixed_point import MOST_CHANGE, FixedPoint, FixedPointSums, beyond
from chainfed_ray.aggregation.mean import RunningMean
from chainfed_ray.aggregation.privacy import PrivateMean
from chainfed_ray.client.privacy import Noise
from tests.builders import assert_same

# Changes as large as a mean takes, and as small as training makes them: a float64 sum of both depends on the order.
values = st.floats(-MOST_CHANGE, MOST_CHANGE, width=32) | st.floats(-(2.0**-12), 2.0**-12, width=32)
weights = st.integers(1, 10**6)
rounds = st.lists(st.tuples(st.lists(values, min_size=3, max_size=3), weights), min_size=1, max_size=9)
starts = st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3)
Round = list[tuple[list[float], int]]


def exact(updates: Round, place: int, start: float = 0.0) -> Fraction:
    """The weighted mean of the entry at ``place`` of changes from ``start``, as a fraction."""
    total = sum(weight for _, weight in updates)
    return sum((Fraction(found[place]) - Fraction(start)) * weight for found, weight in updates) / total


@pytest.mark.slow
@given(rounds, starts, st.randoms(use_true_random=False))
def test_no_order_and_no_parts_change_a_bit(updates: Round, start: list[float], random: Any) -> None:
    before, total = {"x": torch.tensor(start)}, sum(weight for _, weight in updates)
    sent = [({"x": torch.tensor(found)}, weight) for found, weight in updates]
    sent = [update for update in sent if beyond(before, update[0], MOST_CHANGE) is None]
    in_order, shuffled = RunningMean(before, total), list(enumerate(sent))
    random.shuffle(shuffled)
    for place, (tensors, weight) in enumerate(sent):
        in_order.add(place, tensors, weight)
    parts = RunningMean(before, total), RunningMean(before, total)
    for place, (tensors, weight) in shuffled:
        random.choice(parts).add(place, tensors, weight)
    whole = RunningMean(before, total)
    for part in parts:
        whole.merge(part)
    assert_same(whole.result(), in_order.result())


@pytest.mark.slow
@given(rounds)
def test_the_mean_is_within_its_bound_of_the_exact_one(updates: Round) -> None:
    form = FixedPoint(MOST_CHANGE, sum(weight for _, weight in updates))
    sums = FixedPointSums(form)
    for found, weight in updates:
        sums.add("x", torch.tensor(found, dtype=torch.float64), weight)
    mean = sums.total("x") / sums.weights["x"]
    for place, value in enumerate(mean.tolist()):
        error = abs(Fraction(value) - exact(updates, place))
        assert error <= Fraction(2) ** -(form.fraction_bits + 1) + Fraction(2) ** -43


@pytest.mark.slow
@given(rounds, starts)
def test_it_is_the_mean_in_float64_but_for_the_last_place(updates: Round, start: list[float]) -> None:
    before, total = {"x": torch.tensor(start)}, sum(weight for _, weight in updates)
    mean = RunningMean(before, total)
    updates = [(found, weight) for found, weight in updates if mean.impossible({"x": torch.tensor(found)}) is None]
    for place, (found, weight) in enumerate(updates):
        mean.add(place, {"x": torch.tensor(found)}, weight)
    if not updates:
        assert mean.result() == {}
        return
    plain = np.average(np.array([found for found, _ in updates]), 0, [weight for _, weight in updates])
    ours = mean.result()["x"].numpy()
    most = np.spacing(np.abs(ours)) / 2 + 2.0 ** -(mean.fraction_bits + 1) + 2.0**-43
    assert (np.abs(ours.astype(np.float64) - plain) <= most).all()


@pytest.mark.slow
@given(st.floats(1e-30, 1e30), st.integers(1, 2**53), st.lists(st.floats(0, 1), min_size=1, max_size=9), st.booleans())
def test_no_sum_overflows(bound: float, weight: int, shares: list[float], down: bool) -> None:
    """Every number at the bound, all of one sign, and the whole weight used: the largest sum that there can be."""
    form = FixedPoint(bound, weight)
    sums, left, sign = FixedPointSums(form), weight, -1 if down else 1
    for share in [*shares, 1.0]:
        part = min(left, int(weight * share) if share < 1 else left)
        if part:
            sums.add("x", torch.full((1,), sign * bound, dtype=torch.float64), part)
        left -= part
    assert weight * int(form.whole(torch.tensor([bound], dtype=torch.float64))) <= 2**62
    assert sums.total("x").item() == pytest.approx(sign * bound * weight, rel=2.0**-8)
    assert np.sign(sums.total("x").item()) == sign
    with pytest.raises(OverflowError, match="for which its sum has room"):
        sums.add("x", torch.zeros(1, dtype=torch.float64), 1)


@given(st.lists(st.integers(1, 10**5), min_size=1, max_size=6), st.floats(1e-3, 1e4), st.booleans())
def test_sums_are_added_without_overflow(counts: list[int], bound: float, down: bool) -> None:
    """Each is a sum of so many numbers, all at the bound."""
    form, sign = FixedPoint(bound, sum(counts)), -1 if down else 1
    sums = FixedPointSums(form)
    for count in counts:
        sums.add_sum("x", torch.full((1,), sign * bound * count, dtype=torch.float64), count)
    assert sums.total("x").item() == pytest.approx(sign * bound * sum(counts), rel=1e-6)
    with pytest.raises(OverflowError):
        sums.add_sum("x", torch.zeros(1, dtype=torch.float64), 1)


def test_what_is_beyond_the_bound_is_held_at_it() -> None:
    """Should a number ever come that was not checked: no sum overflows by it."""
    form = FixedPoint(1.0, 3)
    values = torch.tensor([1e300, -1e300, 0.5], dtype=torch.float64)
    assert form.whole(values).tolist() == [2**60, -(2**60), 2**59]


@pytest.mark.parametrize("clients", [1, 5])
def test_rounding_towards_zero_makes_no_change_larger(clients: int) -> None:
    form = FixedPoint(0.3, clients)
    drawn = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.6 - 0.3
    held = form.whole(drawn.clone(), towards_zero=True).double() * 2.0**-form.fraction_bits
    assert (held.abs() <= drawn.abs()).all()
    assert ((held - drawn).abs() < 2.0**-form.fraction_bits).all()


def test_a_private_sum_needs_no_order_either() -> None:
    start = {"x": torch.zeros(64)}
    generator = torch.Generator().manual_seed(1)
    updates = [{"x": torch.randn(64, generator=generator) * 10.0**-place} for place in range(6)]
    forwards, backwards = (PrivateMean(start, 6, 0.5, Noise(0.0, b"")) for _ in range(2))
    for place, update in enumerate(updates):
        forwards.add(place, update, 1)
        backwards.add(place, updates[5 - place], 1)
    assert torch.equal(forwards.moved("x"), backwards.moved("x")), "in float64, before anything is rounded"


def test_sums_of_other_forms_do_not_mix() -> None:
    with pytest.raises(ValueError, match="cannot be added"):
        RunningMean({}, 10).merge(RunningMean({}, 2000))


@pytest.mark.parametrize(("bound", "weight"), [(0.0, 1), (float("inf"), 1), (float("nan"), 1), (1.0, 0), (1.0, 2**54)])
def test_a_form_that_is_none_is_refused(bound: float, weight: int) -> None:
    with pytest.raises(ValueError, match="numbers of at most"):
        FixedPoint(bound, weight)
