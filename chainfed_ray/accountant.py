"""What a job's releases cost: ε of client-level (ε, δ)-differential privacy, by Rényi differential privacy (Mironov, 2017).

Two fleets are neighbours if one client's data is replaced by any other: the sum of clipped updates then moves by 2C at most, so
noise of z·C is a Gaussian mechanism with the multiplier z/2. A round samples a fixed number of clients without replacement.

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
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from chainfed_ray.config import JobSpec
from chainfed_ray.records import Round

_ORDERS = np.array([1 + tenth / 10 for tenth in range(1, 100)] + [*range(11, 64), 80, 96, 128, 256, 512])
_REPLACED = 2  # the sensitivity of the sum, in units of C: one contribution goes, another one comes


class Release(NamedTuple):
    """A round that counted: the share of clients that were sampled, and the deviation of the sum's noise in units of C."""

    rate: float
    multiplier: float


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """ε, at ``delta``, of all ``releases`` together; 0 without any."""
    counts = Counter(releases)
    if not counts:
        return 0.0
    from opacus.accountants.analysis.rdp import get_privacy_spent  # takes seconds

    rdp = sum(count * _rdp(release) for release, count in counts.items())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the (smallest|largest) alpha")  # any order gives a bound
        spent, _ = get_privacy_spent(orders=_ORDERS, rdp=rdp, delta=delta)
    return max(float(spent), 0.0)


@lru_cache(maxsize=4096)
def _rdp(release: Release) -> np.ndarray:
    """Rényi differential privacy of one release, at each order."""
    from opacus.accountants.analysis.rdp import compute_rdp  # takes seconds

    deviation = release.multiplier / _REPLACED
    whole = _ORDERS / (2 * deviation**2)
    one_by_one = compute_rdp(q=release.rate, noise_multiplier=deviation, steps=1, orders=list(_ORDERS))
    log_a = np.maximum(one_by_one, 0) * (_ORDERS - 1)
    # log(1 + 2·(A − 1)); where A would be too large a number, 2·A is as good.
    log_bound = np.where(log_a < 30, np.log1p(2 * np.expm1(np.minimum(log_a, 30))), log_a + math.log(2))
    bound: np.ndarray = np.minimum(log_bound / (_ORDERS - 1), whole)
    return bound


class Ledger:
    """What the rounds of a job cost, of which ``admitted`` clients may be sampled at first.

    It knows nothing but the records, so it is the same whoever ran them. A round that did not count released nothing.
    """

    def __init__(self, spec: JobSpec, admitted: int) -> None:
        assert spec.privacy, "there is no price without it"
        self._spec, self._privacy, self._admitted = spec, spec.privacy, admitted

    def spent(self, history: Sequence[Round]) -> float:
        """ε of every model that came out of ``history``, together."""
        releases, _ = self._releases(history)
        return epsilon(releases, self._privacy.delta)

    def with_another(self, history: Sequence[Round]) -> float:
        """ε after one more round, in which no more clients answer than must."""
        releases, population = self._releases(history)
        sampled = min(self._spec.rounds.clients, population)
        another = self._release(population, sampled, min(self._spec.quorum, sampled))
        return epsilon([*releases, another], self._privacy.delta)

    def stop(self, history: Sequence[Round]) -> str | None:
        """Why there may be no further round: it could take ε beyond the job's limit. None if it cannot."""
        limit = self._privacy.epsilon
        if limit is None or (dearer := self.with_another(history)) <= limit:
            return None
        return f"privacy limit: one more round could take ε to {dearer:.3g}, beyond {limit:g}"

    def _releases(self, history: Sequence[Round]) -> tuple[list[Release], int]:
        """One for each round that counted; and the clients that may be sampled next, without those over their budgets."""
        left_out: set[str] = set()
        releases = []
        for record in history:
            if record.counted:
                population, answered = self._admitted - len(left_out), len(record.turns)
                releases.append(self._release(population, answered + len(record.lost), answered))
            left_out |= {lost.client for lost in record.lost if lost.over_budget}
        return releases, self._admitted - len(left_out)

    def _release(self, population: int, sampled: int, answered: int) -> Release:
        multiplier = self._privacy.noise_multiplier
        if self._privacy.where == "client":
            multiplier *= math.sqrt(answered / self._spec.rounds.clients)  # those that did not answer added no noise
        return Release(sampled / population, multiplier)
