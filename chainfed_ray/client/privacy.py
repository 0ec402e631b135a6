"""What a client does with its update before it sends it, in a job with privacy: it clips it, and may add noise.

``aggregation/privacy.py`` is the whole of the method, and says where the keys of the noise come from.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import shake_256

import numpy as np
import torch
from torch import Tensor

from chainfed_ray.model.adapters import Tensors, change

CHUNK = 4096  # values whose noise is drawn at once; each takes about 56 bytes meanwhile


@dataclass(frozen=True)
class Noise:
    """Gaussian noise with the standard deviation ``deviation``. The same ``key`` always gives the same noise."""

    deviation: float
    key: bytes = field(repr=False)

    def add_to(self, name: str, value: Tensor) -> None:
        """Add the noise of the tensor called ``name`` to its ``value`` (float64, contiguous), in place."""
        for place, chunk in enumerate(value.view(-1).split(CHUNK)):
            chunk.add_(torch.from_numpy(self._drawn(f"{name}/{place}", len(chunk))))

    def _drawn(self, name: str, count: int) -> np.ndarray:
        pairs = (count + 1) // 2
        words = np.frombuffer(shake_256(self.key + name.encode()).digest(16 * pairs), "<u8")
        uniform = ((words >> 11) + 0.5) * 2.0**-53  # 53 bits each; never 0, since the next line takes the logarithm
        # The transform of Box and Muller (1958): two uniform numbers give two independent Gaussian ones.
        radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * math.pi * uniform[pairs:]
        gaussian: np.ndarray = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        return gaussian * self.deviation


@dataclass(frozen=True)
class ClientPrivacy:
    """What a client does with its update before it sends it: it clips it to the L2 norm ``clip`` and adds ``noise``, if any."""

    clip: float
    noise: Noise | None

    def applied(self, start: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> Tensors:
        """The tensors to send: every tensor of ``start``, plus its clipped change if it is in ``trained``, plus noise.

        Where noise is added, even a tensor is sent that was not trained.
        """
        factor = clip_factor(start, trained, self.clip)
        sent: Tensors = {}
        for name, tensor in start.items():  # one tensor at a time and in place, to save the client's memory
            if name in trained:
                value = change(tensor, trained[name]).mul_(factor)
            else:
                value = torch.zeros(tensor.shape, dtype=torch.float64)
            if self.noise:
                self.noise.add_to(name, value)
            sent[name] = value.add_(tensor).float()
        return sent


def clip_factor(start: Mapping[str, Tensor], trained: Mapping[str, Tensor], bound: float) -> float:
    """min(1, C / |Δ|₂), where C is ``bound`` and Δ the change of all ``trained`` tensors together."""
    squares = (float(change(start[name], tensor).square_().sum()) for name, tensor in trained.items())
    norm = math.sqrt(math.fsum(squares))
    return min(1.0, bound / norm) if norm else 1.0
