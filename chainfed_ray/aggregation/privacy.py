"""Client-level differential privacy: updates are clipped and noised before anything is released.

The method is DP-FedAvg (McMahan et al., 2018, algorithm 1, fixed denominator) with equal weights. A round samples
m = ``rounds.clients`` clients. Each contributes Δ, the change of the tensors that it trained, and zero for the stage's others::

    x ← x + (Σ Δ · min(1, C / |Δ|₂) + N(0, z² C²)) / m

So a single client moves the sum by C at most, whoever answers. Either the server adds the noise to the sum, or each client
adds a share of it, N(0, z² C² / m), to its own update. The server then adds the shares of clients that did not answer.
``planning/accountant.py`` computes the privacy that this gives.

The noise must be secret. It must also be the same when a round is run again, because two draws of noise on one update would
reveal more than one. So keyed hashes derive it from a secret of the job, 256 bits that are drawn once (``CommitLog.secret``):
BLAKE2b gives the key of a round, or of a client in a round, and SHAKE-256 of the key, the tensor's name and the place in the
tensor gives the bits of the noise.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b

import torch
from torch import Tensor

from chainfed_ray.aggregation.fixed_point import MOST_CHANGE, FixedPoint, FixedPointSums, beyond
from chainfed_ray.chain import Window
from chainfed_ray.client.privacy import ClientPrivacy, Noise, clip_factor
from chainfed_ray.model.adapters import Tensors, change
from chainfed_ray.spec.sections import PrivacySpec


class PrivateMean:
    """An ``Aggregate`` with privacy: it clips changes from ``start`` to ``clip``, sums them, adds ``noise`` and divides by m.

    m is ``clients``, the number sampled. Clients have clipped their updates; clipping here bounds a client that has not. If
    ``clip`` is None, each client has added a share of 1/m of the noise; then only the missing shares are added here. Every
    tensor of ``start`` gets noise, even if no client trained it.

    Changes are summed as integers, so the sum has the same bits in any order. They are rounded towards zero: a client moves the
    sum by C at most, after rounding as before. ``bound`` is the largest change of an entry that a client may send if it clips.
    """

    def __init__(
        self, start: Tensors, clients: int, clip: float | None, noise: Noise, bound: float = MOST_CHANGE
    ) -> None:
        self.noise = noise
        self._start, self._clients, self._clip = start, clients, clip
        self._sums = FixedPointSums(FixedPoint(bound if clip is None else clip, clients))
        self._answered = 0

    @property
    def fraction_bits(self) -> int:
        """See ``Aggregate``."""
        return self._sums.form.fraction_bits

    def impossible(self, tensors: Mapping[str, Tensor]) -> str | None:
        """See ``Aggregate``: an entry has changed too much to be summed. What is clipped here never has."""
        return None if self._clip is not None else beyond(self._start, tensors, self._sums.form.bound)

    def add(self, place: int, tensors: Mapping[str, Tensor], examples: int) -> None:
        """Add an update. ``place`` makes no difference, and neither does ``examples``: all clients have the same weight."""
        factor = 1.0 if self._clip is None else clip_factor(self._start, tensors, self._clip)
        for name, tensor in tensors.items():
            self._sums.add(name, change(self._start[name], tensor).mul_(factor), 1, towards_zero=True)
        self._answered += 1

    def result(self) -> Tensors:
        """The new tensors in float32."""
        return {name: self.moved(name).float() for name in self._start}

    def moved(self, name: str) -> Tensor:
        """The new value of the tensor called ``name``, in float64."""
        start = self._start[name]
        noised = self._sums.total(name) if self._sums.weights[name] else torch.zeros(start.shape, dtype=torch.float64)
        if missing := self._missing():
            missing.add_to(name, noised)
        return noised.div_(self._clients).add_(start)

    def _missing(self) -> Noise | None:
        """The noise that is still to be added here; None if the clients have added all of it."""
        if self._clip is not None:
            return self.noise
        share = 1 - self._answered / self._clients
        return replace(self.noise, deviation=self.noise.deviation * math.sqrt(share)) if share else None


def private_mean(spec: PrivacySpec, secret: bytes, index: int, start: Tensors, clients: int) -> PrivateMean:
    """The aggregate of round ``index``. ``spec.where`` says whether the server or the clients add the noise."""
    noise = Noise(spec.noise_multiplier * spec.clip, key_of(secret, "server", index))
    if spec.where == "server":
        return PrivateMean(start, clients, spec.clip, noise)
    # A draw of Noise is below 9 deviations, since its uniform numbers have 53 bits. Twice as much leaves room for rounding.
    most = 2 * spec.clip * (1 + 9 * spec.noise_multiplier / math.sqrt(clients))
    return PrivateMean(start, clients, None, noise, max(most, MOST_CHANGE))


def client_privacy(
    spec: PrivacySpec, secret: bytes, index: int, client: str, window: Window, clients: int
) -> ClientPrivacy:
    """What ``client`` does with its update of ``window`` in round ``index``: it clips it, and may add a share of the noise.

    The key of its noise is the only one the client gets. It depends on the window: with the same noise for two windows, the
    difference of two updates would have none.
    """
    if spec.where == "server":
        return ClientPrivacy(spec.clip, None)
    deviation = spec.noise_multiplier * spec.clip / math.sqrt(clients)
    return ClientPrivacy(spec.clip, Noise(deviation, key_of(secret, "client", index, client, window.bottom)))


def sampling_seed(secret: bytes) -> int:
    """The seed of client sampling. It is secret, unlike the job's seed: ε is right only while nobody knows the samples."""
    return int.from_bytes(key_of(secret, "sample"))


def key_of(secret: bytes, *names: str | int) -> bytes:
    """The key for the purpose that ``names`` give, such as ``"client", 3, "phone-0"``."""
    return blake2b("/".join(map(str, names)).encode(), key=secret, digest_size=32).digest()
