"""Client-level differential privacy: updates are clipped and noised before anything is released.

DP-FedAvg (McMahan et al., 2018, algorithm 1, fixed denominator), with weights that are all alike. Of m = ``rounds.clients``
sampled clients, each contributes Δ, the change of all tensors that it trained, and zero for the others of the stage::

    x ← x + (Σ Δ · min(1, C / |Δ|₂) + N(0, z² C²)) / m

So one client moves the sum by C at most, whoever answers. The noise is added to the sum by the server, or a share of it,
N(0, z² C² / m), by each client to its own update; shares of those that do not answer are added by the server.
``accountant.py`` says what that is worth.

Noise has to be a secret, and the same when a round is run again: two draws of it on one update would tell more than one. So
it follows from a secret of the job, 256 bits that are drawn once (``CommitLog.secret``), by keyed hashes: BLAKE2b for the key
of a round, and of a client in a round; SHAKE-256, over key, tensor name and place in it, for the bits of the noise itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b, shake_256

import numpy as np
import torch
from torch import Tensor

from chainfed_ray.chain import Window
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.spec.sections import PrivacySpec

CHUNK = 4096  # values whose noise is drawn at once: in all they take about 56 bytes each


@dataclass(frozen=True)
class Noise:
    """Gaussian noise with a standard ``deviation``, all of which follows from ``key``."""

    deviation: float
    key: bytes = field(repr=False)

    def add_to(self, name: str, value: Tensor) -> None:
        """Add the noise of the tensor called ``name`` to its ``value`` (float64, contiguous), in place."""
        for place, chunk in enumerate(value.view(-1).split(CHUNK)):
            chunk.add_(torch.from_numpy(self._drawn(f"{name}/{place}", len(chunk))))

    def _drawn(self, name: str, count: int) -> np.ndarray:
        pairs = (count + 1) // 2
        words = np.frombuffer(shake_256(self.key + name.encode()).digest(16 * pairs), "<u8")
        uniform = ((words >> 11) + 0.5) * 2.0**-53  # 53 bits each; never 0, whose logarithm there is not
        # Box and Muller, 1958: two of them give two independent Gaussians.
        radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * math.pi * uniform[pairs:]
        gaussian: np.ndarray = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        return gaussian * self.deviation


@dataclass(frozen=True)
class NoiseShare:
    """What a client does to its update before it sends it: it clips it to the norm ``clip``, and adds its share of noise."""

    clip: float
    noise: Noise

    def applied(self, start: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> Tensors:
        """``trained`` as it may be sent. Every tensor of ``start`` is: one that was not trained with noise alone."""
        factor = clip_factor(start, trained, self.clip)
        sent: Tensors = {}
        for name, tensor in start.items():  # a tensor at a time, and in place: a client has little memory
            value = _change(tensor, trained[name]).mul_(factor) if name in trained else _zeros(tensor)
            self.noise.add_to(name, value)
            sent[name] = value.add_(tensor).float()
        return sent


class PrivateMean:
    """An ``Aggregate``: changes from ``start``, clipped to ``clip``; then ``noise``, and 1/m of it, for m = ``clients``.

    Without a ``clip`` clients do both, each with a share of 1/m of the noise: those missing are added here. Every tensor of
    ``start`` gets noise, whether or not anybody trained it.
    """

    def __init__(self, start: Tensors, clients: int, clip: float | None, noise: Noise) -> None:
        self.noise = noise
        self._start, self._clients, self._clip = start, clients, clip
        self._sums: Tensors = {name: _zeros(tensor) for name, tensor in start.items()}
        self._answered = 0

    def add(self, tensors: Mapping[str, Tensor], examples: int) -> None:
        """Add an update; that it has more ``examples`` than others does not count."""
        factor = 1.0 if self._clip is None else clip_factor(self._start, tensors, self._clip)
        for name, tensor in tensors.items():
            self._sums[name].add_(_change(self._start[name], tensor).mul_(factor))
        self._answered += 1

    def result(self) -> Tensors:
        """The new tensors, in float32."""
        return {name: self.moved(name).float() for name in self._start}

    def moved(self, name: str) -> Tensor:
        """The new value of a tensor, in float64."""
        noised = self._sums[name].clone()
        if missing := self._missing():
            missing.add_to(name, noised)
        return noised.div_(self._clients).add_(self._start[name])

    def _missing(self) -> Noise | None:
        """The noise that no client has added."""
        if self._clip is not None:
            return self.noise
        share = 1 - self._answered / self._clients
        return replace(self.noise, deviation=self.noise.deviation * math.sqrt(share)) if share else None


def clip_factor(start: Mapping[str, Tensor], trained: Mapping[str, Tensor], bound: float) -> float:
    """min(1, C / |Δ|₂) for C = ``bound`` and the change Δ of all ``trained`` tensors together."""
    squares = (float(_change(start[name], tensor).square_().sum()) for name, tensor in trained.items())
    norm = math.sqrt(math.fsum(squares))
    return min(1.0, bound / norm) if norm else 1.0


def private_mean(spec: PrivacySpec, secret: bytes, index: int, start: Tensors, clients: int) -> PrivateMean:
    """What the server makes of the updates of round ``index``: its own clipping and noise, or those of its clients."""
    noise = Noise(spec.noise_multiplier * spec.clip, key_of(secret, "server", index))
    return PrivateMean(start, clients, spec.clip if spec.where == "server" else None, noise)


def share_of(spec: PrivacySpec, secret: bytes, index: int, client: str, window: Window, clients: int) -> NoiseShare:
    """What ``client`` does to its update of ``window`` in round ``index``; it learns no key but this one.

    Another window gives another update, and so has other noise: the difference of two that had the same would have none.
    """
    deviation = spec.noise_multiplier * spec.clip / math.sqrt(clients)
    return NoiseShare(spec.clip, Noise(deviation, key_of(secret, "client", index, client, window.bottom)))


def sampling_seed(secret: bytes) -> int:
    """From which it follows who is sampled. ε counts on that being unknown, so it is not the job's seed."""
    return int.from_bytes(key_of(secret, "sample"))


def _change(start: Tensor, trained: Tensor) -> Tensor:
    copy = trained.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    return copy.sub_(start)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float64)


def key_of(secret: bytes, *names: str | int) -> bytes:
    """The key of whatever ``names`` name, such as a client in a round."""
    return blake2b("/".join(map(str, names)).encode(), key=secret, digest_size=32).digest()
