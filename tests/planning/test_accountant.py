"""Promises of the price: no less than what is given away, and what the library and published results say."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from chainfed_ray.planning.accountant import ORDERS, Ledger, Release, epsilon, rdp_of
from chainfed_ray.spec.parse import parse_job
from tests.builders import SPEC


def exact_gaussian(mu: float, delta: float) -> float:
    """ε of Gaussian mechanisms with |shift| / σ = μ, all in all (Balle and Wang, 2018, theorem 8)."""

    def excess(found: float) -> float:
        return float(norm.cdf(mu / 2 - found / mu) - math.exp(found) * norm.cdf(-mu / 2 - found / mu)) - delta

    return float(brentq(excess, 0, 500))


@pytest.mark.parametrize("rounds", [1, 10, 100])
@pytest.mark.parametrize("multiplier", [2.0, 8.0, 40.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_without_sampling_it_is_the_gaussian_mechanism(rounds: int, multiplier: float, delta: float) -> None:
    """Between the exact answer and that of zero-concentrated privacy (Bun and Steinke, 2016, proposition 1.3)."""
    ours = epsilon([Release(1.0, multiplier)] * rounds, delta)
    mu = 2 * math.sqrt(rounds) / multiplier
    rho = mu**2 / 2
    assert exact_gaussian(mu, delta) <= ours <= rho + 2 * math.sqrt(rho * math.log(1 / delta))
    rdp = compute_rdp(q=1.0, noise_multiplier=multiplier / 2, steps=rounds, orders=list(ORDERS))
    assert ours == pytest.approx(get_privacy_spent(orders=ORDERS, rdp=rdp, delta=delta)[0])


# ε at δ = 1e-5 by Google's dp-accounting 0.6.0: RdpAccountant(neighboring_relation=REPLACE_ONE), SampledWithoutReplacement of
# GaussianDpEvent(z / 2). It follows Wang, Balle and Kasiviswanathan, 2019, theorem 27.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("clients", "sampled", "multiplier", "rounds", "google"),
    [
        (100, 10, 2.0, 50, 9.427720852694703),
        (20, 5, 4.0, 24, 6.583267228329749),
        (1000, 50, 2.0, 200, 9.279486140524956),
        (10_000, 100, 1.0, 1000, 20.987072439841914),
        (100_000, 1000, 1.0, 500, 15.556851771846127),
        (10, 10, 2.0, 1, 4.728507067217623),
    ],
)
def test_between_sampling_one_by_one_and_the_published_bound(
    clients: int, sampled: int, multiplier: float, rounds: int, google: float
) -> None:
    ours = epsilon([Release(sampled / clients, multiplier)] * rounds, 1e-5)
    rate = sampled / clients
    rdp = compute_rdp(q=rate, noise_multiplier=multiplier / 2, steps=rounds, orders=list(ORDERS))
    one_by_one, _ = get_privacy_spent(orders=ORDERS, rdp=rdp, delta=1e-5)
    assert one_by_one - 1e-9 <= ours <= google + 1e-9


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=6),
    st.floats(-1, 1),
    st.booleans(),
    st.sampled_from([0.8, 1.5, 4.0]),
)
def test_no_two_neighbours_are_further_apart_than_the_price(
    contributions: list[float], other: float, worst: bool, deviation: float
) -> None:
    """One of N clients is sampled, and C = 1: both mixtures are known, and their divergence follows by integration."""
    neighbour = [*contributions[:-1], other]
    if worst:  # one client at one end, or at the other, and all others there
        contributions = [-1.0] * len(contributions)
        neighbour = [*contributions[:-1], 1.0]

    # Far enough to both sides for the highest order, and so fine that sums of smooth functions are integrals.
    grid, step = np.linspace(-2 * 9 - 12 * deviation, 2 * 9 + 12 * deviation, 20_001, retstep=True)

    def log_mixture(means: list[float]) -> np.ndarray:
        found: np.ndarray = logsumexp(norm.logpdf(grid[:, None], means, deviation), axis=1) - math.log(len(means))
        return found

    first, second = log_mixture(contributions), log_mixture(neighbour)
    price = rdp_of(Release(1 / len(contributions), deviation))
    for order in (1.5, 2.0, 4.0, 9.0):
        for p, q in ((first, second), (second, first)):
            divergence = (logsumexp(order * p - (order - 1) * q) + math.log(step)) / (order - 1)
            assert divergence <= price[list(ORDERS).index(order)] + 1e-9


@pytest.mark.slow
@given(st.floats(1e-4, 1), st.floats(0.3, 50), st.integers(1, 300), st.sampled_from([1e-4, 1e-6, 1e-9]))
@settings(max_examples=15, deadline=None)
def test_more_rounds_cost_more_and_more_noise_costs_less(
    rate: float, multiplier: float, rounds: int, delta: float
) -> None:
    here = epsilon([Release(rate, multiplier)] * rounds, delta)
    assert epsilon([], delta) == 0 <= here
    assert epsilon([Release(rate, multiplier)] * (rounds + 1), delta) >= here
    assert epsilon([Release(rate, multiplier * 1.5)] * rounds, delta) <= here
    assert epsilon([Release(rate, multiplier)] * rounds, delta / 10) >= here
    assert epsilon([Release(min(1.0, rate * 2), multiplier)] * rounds, delta) >= here - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("multiplier", [0.0001, 0.01, 1.0, 10_000.0])
def test_every_noise_that_a_job_may_ask_for_has_a_finite_price(rate: float, multiplier: float) -> None:
    price = rdp_of(Release(rate, multiplier))
    assert np.isfinite(price).all()
    assert (price >= 0).all()
    assert math.isfinite(epsilon([Release(rate, multiplier)], 1e-6))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=4, max_size=6),
    st.floats(-1, 1),
    st.integers(1, 3),
    st.sets(st.integers(0, 4)),
    st.sampled_from([0.8, 2.0]),
)
def test_the_price_holds_whoever_does_not_answer(
    contributions: list[float], other: float, sampled: int, silent: set[int], deviation: float
) -> None:
    """A mixture over every sample, to which silent clients add zero; with other data the last may fall silent, too."""
    here = [0.0 if place in silent else value for place, value in enumerate(contributions)]
    neighbour = [*here[:-1], other if len(silent) % 2 else 0.0]
    grid, step = np.linspace(-25 - 12 * deviation, 25 + 12 * deviation, 8001, retstep=True)

    def log_mixture(values: list[float]) -> np.ndarray:
        sums = [sum(chosen) for chosen in combinations(values, sampled)]
        found: np.ndarray = logsumexp(norm.logpdf(grid[:, None], sums, deviation), axis=1) - math.log(len(sums))
        return found

    first, second = log_mixture(here), log_mixture(neighbour)
    price = rdp_of(Release(sampled / len(here), deviation))
    for order in (1.5, 3.0, 7.0):
        for p, q in ((first, second), (second, first)):
            divergence = (logsumexp(order * p - (order - 1) * q) + math.log(step)) / (order - 1)
            assert divergence <= price[list(ORDERS).index(order)] + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "multiplier"), [(0.1, 4.0), (0.5, 8.0), (0.02, 2.0)])
@pytest.mark.parametrize("order", [1.5, 2.0, 7.0])
def test_a_sample_of_fixed_size_costs_twice_the_excess_of_sampling_one_by_one(
    rate: float, multiplier: float, order: float
) -> None:
    """Step 3 of the bound, with the moment A integrated here."""
    deviation = multiplier / 2
    grid, step = np.linspace(-40 * deviation, 40 * deviation, 80_001, retstep=True)
    alone = norm.logpdf(grid, 0, deviation)
    mixture = np.logaddexp(math.log1p(-rate) + alone, math.log(rate) + norm.logpdf(grid, 1, deviation))
    moment = math.exp(logsumexp(order * mixture - (order - 1) * alone) + math.log(step))
    expected = min(math.log1p(2 * (moment - 1)) / (order - 1), order / (2 * deviation**2))
    assert rdp_of(Release(rate, multiplier))[list(ORDERS).index(order)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_to_release_a_round_only_if_enough_answer_would_cost_more() -> None:
    """Why each is released: of two clients one answers, a round samples one of them, and N(0, 1.2²) is added."""
    order, deviation = 20.0, 1.2
    moment = math.exp(order * (order - 1) * (2 / deviation) ** 2 / 2)  # of −1 against 1, without sampling
    told = math.log(1 / 2 + moment / 2) / (
        order - 1
    )  # nothing comes out in one half of cases, and tells which half it is
    price = rdp_of(Release(1 / 2, deviation))[list(ORDERS).index(order)]
    assert told > price


def a_ledger(admitted: int, where: str = "server", limit: float | None = None, clients: int = 3) -> Ledger:
    document = SPEC.document()
    document["chain"] |= {"start": 1, "head": "zero"}
    document["rounds"] |= {"clients": clients, "total": 50}
    document["privacy"] = {"clip": 1.0, "noise_multiplier": 2.0, "where": where, "epsilon": limit}
    spec = parse_job(document)
    assert spec.privacy
    return Ledger(spec.privacy, spec.rounds, admitted)


@pytest.mark.parametrize("where", ["server", "client"])
def test_every_round_has_its_price_beforehand(where: str) -> None:
    assert a_ledger(12, where).spent(0) == 0
    assert a_ledger(12, where).spent(7) == epsilon([Release(3 / 12, 2.0)] * 7, 1e-5)
    assert a_ledger(3, where, clients=3).spent(2) == epsilon([Release(1.0, 2.0)] * 2, 1e-5)
    assert a_ledger(2, where, clients=3).spent(2) == epsilon([Release(1.0, 2.0)] * 2, 1e-5), "no more than there are"


@pytest.mark.slow
@settings(deadline=None)
@given(st.floats(0.01, 60))
def test_the_rounds_of_a_limit_are_the_most_that_it_allows(limit: float) -> None:
    ledger = a_ledger(12, limit=limit)
    assert ledger.spent(ledger.total) <= limit or ledger.total == 0
    if ledger.total == 50:
        assert ledger.stopped() is None
        return
    dearer = ledger.spent(ledger.total + 1)
    assert dearer > limit
    assert ledger.stopped() == f"privacy limit: one more round could take ε to {dearer:.3g}, beyond {limit:g}"


def test_without_a_limit_a_job_has_the_rounds_that_it_asks_for() -> None:
    assert a_ledger(12).total == 50
    assert a_ledger(12).stopped() is None
