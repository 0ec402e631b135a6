"""What a job's releases cost: ε of client-level (ε, δ)-differential privacy, by Rényi differential privacy (Mironov, 2017).

Two fleets are neighbours if one client's data is replaced by any other: the sum of clipped updates then moves by 2C at most, so
noise of z·C is a Gaussian mechanism with the multiplier z/2. A round samples a fixed number of clients without replacement. One
that does not answer contributes zero, to a sum that is released all the same: the price is that of a round in which all do.

Opacus knows A(a) = E[(P/Q)^a], for P = (1 − q)·N(0, σ²) + q·N(1, σ²) and Q = N(0, σ²): the moments of a Gaussian mechanism
whose records are sampled one by one (Mironov, Talwar and Zhang, 2019). From there to samples of a fixed size:

1. H_γ(M(D), M(D')) ≤ H_γ(P, Q) for each γ ≥ 1, in either direction, where H is the hockey-stick divergence
   (Balle, Barthe and Gaboardi, 2018, theorem 9: both sides are q·δ(ε), of a Gaussian that is not sampled).
2. E[(M(D)/M(D'))^a] = 1 + a(a − 1) ∫₁^∞ (γ^(a−2) H_γ(M(D), M(D')) + γ^(−a−1) H_γ(M(D'), M(D))) dγ (Sason and Verdú, 2016).
3. γ^(−a−1) ≤ γ^(a−2), so this is at most 1 + 2·(A(a) − 1).

Nor does it cost more than a round without sampling, a / (2σ²). What is left is a little less than the bound of Wang, Balle and
Kasiviswanathan (2019) for the same case.
"""

import math
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from chainfed_ray.spec.job import JobSpec

ORDERS = np.array([1 + tenth / 10 for tenth in range(1, 100)] + [*range(11, 64), 80, 96, 128, 256, 512])
_REPLACED = 2  # the sensitivity of the sum, in units of C: one contribution goes, another one comes


class Release(NamedTuple):
    """A round: the share of clients that were sampled, and the deviation of the sum's noise in units of C."""

    rate: float
    multiplier: float


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """ε, at ``delta``, of all ``releases`` together; 0 without any."""
    counts = Counter(releases)
    if not counts:
        return 0.0
    from opacus.accountants.analysis.rdp import get_privacy_spent  # takes seconds

    rdp = sum(count * rdp_of(release) for release, count in counts.items())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the (smallest|largest) alpha")  # any order gives a bound
        spent, _ = get_privacy_spent(orders=ORDERS, rdp=rdp, delta=delta)
    return max(float(spent), 0.0)


@lru_cache(maxsize=4096)
def rdp_of(release: Release) -> np.ndarray:
    """Rényi differential privacy of one release, at each order."""
    from opacus.accountants.analysis.rdp import compute_rdp  # takes seconds

    deviation = release.multiplier / _REPLACED
    whole = ORDERS / (2 * deviation**2)
    one_by_one = compute_rdp(q=release.rate, noise_multiplier=deviation, steps=1, orders=list(ORDERS))
    log_a = np.maximum(one_by_one, 0) * (ORDERS - 1)
    # log(1 + 2·(A − 1)); where A would be too large a number, 2·A is as good.
    log_bound = np.where(log_a < 30, np.log1p(2 * np.expm1(np.minimum(log_a, 30))), log_a + math.log(2))
    bound: np.ndarray = np.minimum(log_bound / (ORDERS - 1), whole)
    return bound


class Ledger:
    """What the rounds of a job cost, of which ``admitted`` clients may be sampled: each the same, fixed beforehand.

    If it depended on what became of a round, and so on who was sampled, that would tell something about the sample.
    """

    def __init__(self, spec: JobSpec, admitted: int) -> None:
        assert spec.privacy, "there is no price without it"
        self._privacy, self._asked = spec.privacy, spec.rounds.total
        sampled = min(spec.rounds.clients, admitted)
        self._release = Release(sampled / admitted, spec.privacy.noise_multiplier)

    def spent(self, rounds: int) -> float:
        """ε of the models of so many rounds, together."""
        return epsilon([self._release] * rounds, self._privacy.delta)

    @cached_property
    def total(self) -> int:
        """The rounds that the job asks for or, if those are fewer, that its limit of ε allows."""
        if self._privacy.epsilon is None:
            return self._asked
        return bisect_right(range(1, self._asked + 1), self._privacy.epsilon, key=self.spent)

    def stopped(self) -> str | None:
        """Why the job has fewer rounds than it asks for. None if it has not."""
        if self.total == self._asked:
            return None
        return (
            f"privacy limit: one more round could take ε to {self.spent(self.total + 1):.3g}, beyond "
            f"{self._privacy.epsilon:g}"
        )
