"""Chooses the next token of a text from a model's logits. Each text has its own random numbers, so others do not change it."""

import torch
from torch import Tensor

from chainfed_ray.serving.messages import Sampling

_COLDEST = 1e-5  # below this temperature, dividing the logits by it may overflow; the likeliest token is taken instead


class Sampler:
    """Chooses the tokens of one text, as ``sampling`` says."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """A token, from the logits of all tokens, [V]."""
        if self._sampling.temperature < _COLDEST:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.float() / self._sampling.temperature, -1)
        if self._sampling.top_p < 1:
            probabilities = _likeliest(probabilities, self._sampling.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._random))


def _likeliest(probabilities: Tensor, share: float) -> Tensor:
    """Keep the fewest tokens that together have the probability ``share``: at least one. The others become 0."""
    ordered, tokens = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, tokens, ordered.where(before < share, 0.0))
