"""The privacy accountant: ε of client-level (ε, δ)-differential privacy, by Rényi differential privacy (Mironov, 2017).

Two fleets are neighbours if they differ in one client's data, which may be replaced by any other data. The sum of clipped
updates then moves by 2C at most, so noise of z·C makes it a Gaussian mechanism with the multiplier z/2. A round samples a fixed
number of clients without replacement. A client that does not answer contributes zero, and the sum is released all the same, so
every round costs as much as one in which all clients answer.

Opacus computes A(a) = E[(P/Q)^a], for P = (1 − q)·N(0, σ²) + q·N(1, σ²) and Q = N(0, σ²). These are the moments of a Gaussian
mechanism that samples each record independently (Mironov, Talwar and Zhang, 2019). Three steps lead to samples of fixed size:

1. H_γ(M(D), M(D')) ≤ H_γ(P, Q) for each γ ≥ 1, in either direction, where H is the hockey-stick divergence
   (Balle, Barthe and Gaboardi, 2018, theorem 9: both sides are q·δ(ε), of a Gaussian that is not sampled).
2. E[(M(D)/M(D'))^a] = 1 + a(a − 1) ∫₁^∞ (γ^(a−2) H_γ(M(D), M(D')) + γ^(−a−1) H_γ(M(D'), M(D))) dγ (Sason and Verdú, 2016).
3. γ^(−a−1) ≤ γ^(a−2), so this is at most 1 + 2·(A(a) − 1).

A round without sampling costs a / (2σ²), and sampling never adds to it, so the smaller of the two bounds holds. It is a little
lower than the bound of Wang, Balle and Kasiviswanathan (2019) for the same case.
"""

import math
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from chainfed_ray.spec.sections import PrivacySpec, RoundsSpec

ORDERS = np.array([1 + tenth / 10 for tenth in range(1, 100)] + [*range(11, 64), 80, 96, 128, 256, 512])
_REPLACED = 2  # the sensitivity of the sum in units of C: one client's contribution is replaced by another


class Release(NamedTuple):
    """The release of a round's model."""

    rate: float  # the share of clients that the round samples
    multiplier: float  # z: the standard deviation of the sum's noise, in units of C


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """ε at ``delta`` of all ``releases`` together. It is 0 if there are none."""
    counts = Counter(releases)
    if not counts:
        return 0.0
    from opacus.accountants.analysis.rdp import get_privacy_spent  # here, because the import takes seconds

    rdp = sum(count * rdp_of(release) for release, count in counts.items())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the (smallest|largest) alpha")  # any order gives a bound
        spent, _ = get_privacy_spent(orders=ORDERS, rdp=rdp, delta=delta)
    return max(float(spent), 0.0)


@lru_cache(maxsize=4096)
def rdp_of(release: Release) -> np.ndarray:
    """The Rényi divergence bound of one release at each of ``ORDERS``."""
    from opacus.accountants.analysis.rdp import compute_rdp  # here, because the import takes seconds

    deviation = release.multiplier / _REPLACED
    whole = ORDERS / (2 * deviation**2)
    one_by_one = compute_rdp(q=release.rate, noise_multiplier=deviation, steps=1, orders=list(ORDERS))
    log_a = np.maximum(one_by_one, 0) * (ORDERS - 1)
    # log(1 + 2·(A − 1)). Where A would overflow, log(2·A) is a bound as well.
    log_bound = np.where(log_a < 30, np.log1p(2 * np.expm1(np.minimum(log_a, 30))), log_a + math.log(2))
    bound: np.ndarray = np.minimum(log_bound / (ORDERS - 1), whole)
    return bound


class Ledger:
    """The privacy cost of the ``rounds`` of a job with ``privacy``, which sample from ``admitted`` clients.

    Every round costs the same, and the cost is fixed beforehand. A cost that depended on the outcome of a round would depend on
    who was sampled, and so reveal something about the sample.
    """

    def __init__(self, privacy: PrivacySpec, rounds: RoundsSpec, admitted: int) -> None:
        self._privacy, self._asked = privacy, rounds.total
        self._release = Release(min(rounds.clients, admitted) / admitted, privacy.noise_multiplier)

    def spent(self, rounds: int) -> float:
        """ε of the models of ``rounds`` rounds together."""
        return epsilon([self._release] * rounds, self._privacy.delta)

    @cached_property
    def total(self) -> int:
        """The number of rounds: ``rounds.total``, or fewer if the job's limit of ε allows fewer."""
        if self._privacy.epsilon is None:
            return self._asked
        return bisect_right(range(1, self._asked + 1), self._privacy.epsilon, key=self.spent)

    def stopped(self) -> str | None:
        """The reason why the job has fewer rounds than it asks for, or None if it has all of them."""
        if self.total == self._asked:
            return None
        return (
            f"privacy limit: one more round could take ε to {self.spent(self.total + 1):.3g}, beyond "
            f"{self._privacy.epsilon:g}"
        )
