"""Properties of the small, pure parts: the window rule, the partitioners, the mean, the planner, the examples."""

from fractions import Fraction
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.aggregation.mean import RunningMean
from chainfed_ray.chain import Chain, start_below
from chainfed_ray.data import docstrings
from chainfed_ray.data.partition import dirichlet, iid
from chainfed_ray.data.tokens import Examples
from chainfed_ray.errors import InvalidJob
from chainfed_ray.federation.stages import Movement, verdict
from chainfed_ray.federation.start import least_loss_start
from chainfed_ray.model.adapters import Adapter
from chainfed_ray.spec.sections import ConvergenceSpec

chains = st.integers(1, 40).flatmap(
    lambda layers: st.integers(0, layers - 1).flatmap(
        lambda start: st.integers(1, layers - start).map(lambda width: Chain(layers, start, width))
    )
)


@given(chains, st.integers(1, 300), st.floats(0.01, 1))
def test_stages_spend_the_budget_and_end_at_the_top(chain: Chain, total: int, share: float) -> None:
    stages = chain.staged(total, share)
    assert sum(stage.rounds for stage in stages) == total
    assert all(stage.rounds >= 1 for stage in stages)
    assert stages[-1].window.top == chain.layers - 1
    for below, above in pairwise(stages):
        assert (above.window.bottom, above.window.top) == (below.window.bottom + 1, below.window.top + 1)


@pytest.mark.slow
@given(chains, st.integers(1, 300))
def test_cyclic_slides_by_one_and_ends_at_the_top(chain: Chain, total: int) -> None:
    visits = [chain.cyclic(index, total) for index in range(total)]
    assert visits[-1] == chain.windows[-1]
    for before, after in pairwise(visits):
        assert after.bottom == (before.bottom + 1 if before != chain.windows[-1] else chain.start)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.floats(0, 1), st.integers(1, 2))
def test_the_start_leaves_room_for_a_window(cka: list[float], threshold: float, width: int) -> None:
    start = start_below(tuple(cka), threshold, width)
    Chain(len(cka), start, width)
    assert all(value >= threshold for value in cka[:start])


@given(st.integers(1, 12), st.integers(0, 60), st.sampled_from([1e-300, 1e-6, 0.1, 1.0, 100.0]), st.integers(0, 99))
def test_partitions_deal_every_row_once(clients: int, extra: int, alpha: float, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 4, clients + extra)
    for shares in (iid(labels, clients, seed), dirichlet(labels, clients, alpha, seed)):
        assert len(shares) == clients
        assert min(len(share) for share in shares) >= 1
        assert sorted(np.concatenate(shares).tolist()) == list(range(len(labels)))


def test_more_clients_than_rows_is_refused() -> None:
    with pytest.raises(InvalidJob, match="at most 3"):
        iid(np.zeros(3), 4, 0)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(-1000, 1000), st.integers(1, 50)), min_size=1, max_size=8))
def test_the_mean_is_weighted_by_examples(updates: list[tuple[int, int]]) -> None:
    """Of changes that are whole eighths, exactly: nothing is rounded before the last step, to float32."""
    mean = RunningMean({"x": torch.zeros(1)}, sum(weight for _, weight in updates))
    for place, (value, weight) in enumerate(updates):
        mean.add(place, {"x": torch.tensor([value / 8])}, weight)
    exact = Fraction(sum(value * weight for value, weight in updates), 8 * sum(weight for _, weight in updates))
    assert mean.result()["x"].item() == torch.tensor(float(exact), dtype=torch.float64).float().item()


@pytest.mark.slow
@given(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=9),
    st.randoms(use_true_random=False),
)
def test_batches_hold_the_examples(rows: list[list[int]], random: Random) -> None:
    offsets = np.cumsum([0, *map(len, rows)])
    ids = np.array([token for row in rows for token in row], dtype=np.int32)
    examples = Examples(ids, offsets, np.arange(len(rows)))
    order = np.array(sorted(range(len(rows)), key=lambda _: random.random()))
    taken = examples.take(order).batch(np.arange(len(rows)))
    direct = examples.batch(order)
    for row, (found, mask) in enumerate(zip(direct.ids, direct.mask, strict=True)):
        assert found[mask.bool()].tolist() == rows[order[row]]
        assert not found[~mask.bool()].any()
    assert torch.equal(taken.ids, direct.ids)
    assert torch.equal(taken.labels, direct.labels)


def test_a_plateau_ends_a_stage_after_its_minimum() -> None:
    rule = ConvergenceSpec(rule="plateau", span=2, minimum=5, threshold=0.01)
    flat, falling = [1.0] * 6, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert verdict(rule, 4, flat[:4], None) is None
    assert verdict(rule, 5, flat[:3], None) is None
    assert verdict(rule, 5, flat[:5], None) == "converged: held-out loss 1.0000 → 1.0000 over 2 rounds"
    assert verdict(rule, 6, falling, None) is None
    assert verdict(rule, 6, [*falling[:3], 0.8, 0.9, 0.9], None) is not None
    assert verdict(ConvergenceSpec(rule="none"), 99, flat, 0.0) is None


@given(st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=1, max_size=6))
def test_effective_movement(steps: list[float]) -> None:
    movement, place = Movement(), torch.zeros(1, dtype=torch.float64)
    for step in steps:
        movement = movement.with_round({"x": place}, {"x": place + step})
        place = place + step
    path = sum(map(abs, steps))
    assert movement.value() == pytest.approx(abs(sum(steps)) / path if path else 0.0, abs=1e-6)
    restored = Movement(movement.tensors)
    assert restored.value() == movement.value()
    rule = ConvergenceSpec(rule="movement", span=len(steps), minimum=1, threshold=0.5)
    assert (verdict(rule, len(steps), [], movement.value()) is not None) == (movement.value() < 0.5)
    assert verdict(rule, len(steps), [], None) is None


def test_a_new_adapter_is_the_identity() -> None:
    hidden = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Adapter(16, 4, seed=1)(hidden), hidden)


@pytest.mark.slow
def test_docstrings_are_balanced_distinct_and_masked() -> None:
    rows = docstrings.rows()
    assert len({text.casefold() for text, _ in rows}) == len(rows) == 8 * docstrings.ROWS_PER_CLASS
    assert all(label not in text.casefold().split() for text, label in rows)


@given(st.lists(st.none() | st.sampled_from([0.25, 0.5, 0.75]), min_size=1))
def test_the_start_is_where_the_loss_is_least_and_the_highest_of_equals(losses: list[float | None]) -> None:
    found = [loss for loss in losses if loss is not None]
    best = least_loss_start(losses)
    if best is None:
        assert not found
        return
    assert losses[best] == min(found)
    assert min(found) not in losses[best + 1 :]
