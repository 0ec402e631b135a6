"""Promises of the price: no less than what is given away, and what the library and published results say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from chainfed_ray.accountant import _ORDERS, Ledger, Release, _rdp, epsilon
from chainfed_ray.config import JobSpec
from chainfed_ray.records import Lost, Round
from tests.test_job_store import SPEC
from tests.test_progress import a_round, an_opening

OPENING = an_opening()


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
    rdp = compute_rdp(q=1.0, noise_multiplier=multiplier / 2, steps=rounds, orders=list(_ORDERS))
    assert ours == pytest.approx(get_privacy_spent(orders=_ORDERS, rdp=rdp, delta=delta)[0])


# ε at δ = 1e-5 by Google's dp-accounting 0.6.0: RdpAccountant(neighboring_relation=REPLACE_ONE), SampledWithoutReplacement of
# GaussianDpEvent(z / 2). It follows Wang, Balle and Kasiviswanathan, 2019, theorem 27.
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
    rdp = compute_rdp(q=rate, noise_multiplier=multiplier / 2, steps=rounds, orders=list(_ORDERS))
    one_by_one, _ = get_privacy_spent(orders=_ORDERS, rdp=rdp, delta=1e-5)
    assert one_by_one - 1e-9 <= ours <= google + 1e-9


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
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
    price = _rdp(Release(1 / len(contributions), deviation))
    for order in (1.5, 2.0, 4.0, 9.0):
        for p, q in ((first, second), (second, first)):
            divergence = (logsumexp(order * p - (order - 1) * q) + math.log(step)) / (order - 1)
            assert divergence <= price[list(_ORDERS).index(order)] + 1e-9


@pytest.mark.slow
@given(st.floats(1e-4, 1), st.floats(0.3, 50), st.integers(1, 300), st.sampled_from([1e-4, 1e-6, 1e-9]))
@settings(max_examples=30, deadline=None)
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
    price = _rdp(Release(rate, multiplier))
    assert np.isfinite(price).all()
    assert (price >= 0).all()
    assert math.isfinite(epsilon([Release(rate, multiplier)], 1e-6))


def a_ledger(
    admitted: int, where: str = "server", limit: float | None = None, clients: int = 3, quorum: int = 2
) -> Ledger:
    document = SPEC.document()
    document["chain"] |= {"start": 1, "head": "zero"}
    document["rounds"] |= {"clients": clients, "quorum": quorum}
    document["privacy"] = {"clip": 1.0, "noise_multiplier": 2.0, "where": where, "epsilon": limit}
    return Ledger(JobSpec.parse(document), admitted)


def a_past(index: int, answered: int, lost: int = 0, over_budget: bool = False, counted: bool = True) -> Round:
    """A round of which so many clients answered; who was lost was a client of its own."""
    gone = tuple(
        Lost(client=f"{index}-{place}", client_class="phone", reason="died", over_budget=over_budget)
        for place in range(lost)
    )
    turns = a_round(index, OPENING).turns[:answered]
    return a_round(index, OPENING, turns=turns, lost=gone, counted=counted)


def test_the_ledger_adds_up_the_rounds_that_counted() -> None:
    ledger = a_ledger(12)
    full = Release(3 / 12, 2.0)
    assert ledger.spent([]) == 0
    assert ledger.spent([a_past(0, 3), a_past(1, 1, 2, counted=False), a_past(2, 3)]) == epsilon([full, full], 1e-5)
    assert ledger.spent([a_past(0, 2, lost=1)]) == epsilon([full], 1e-5), "the server's noise is all there"


def test_noise_of_clients_that_did_not_answer_is_missed() -> None:
    ledger = a_ledger(12, "client")
    assert ledger.spent([a_past(0, 3)]) == epsilon([Release(3 / 12, 2.0)], 1e-5)
    assert ledger.spent([a_past(0, 2, lost=1)]) == epsilon([Release(3 / 12, 2.0 * math.sqrt(2 / 3))], 1e-5)
    assert ledger.spent([a_past(0, 2, lost=1)]) > ledger.spent([a_past(0, 3)])


def test_clients_that_are_left_out_make_the_others_likelier_to_be_sampled() -> None:
    ledger = a_ledger(12)
    history = [a_past(0, 2, lost=1, over_budget=True), a_past(1, 3)]
    assert ledger.spent(history) == epsilon([Release(3 / 12, 2.0), Release(3 / 11, 2.0)], 1e-5)


def test_another_round_is_refused_for_what_it_may_cost() -> None:
    """With noise of the clients: if only a quorum answers. So the limit is never passed."""
    history = [a_past(0, 3)]
    most = epsilon([Release(3 / 12, 2.0), Release(3 / 12, 2.0 * math.sqrt(2 / 3))], 1e-5)
    assert a_ledger(12, "client", limit=most).stop(history) is None
    stop = a_ledger(12, "client", limit=most * 0.999).stop(history)
    assert stop
    assert f"could take ε to {most:.3g}" in stop
    assert a_ledger(12, "client").stop([a_past(index, 3) for index in range(50)]) is None, "without a limit"
