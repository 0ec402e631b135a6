"""Chooses the next token of a text from a model's logits. Each text has its own random numbers, so others do not change it."""

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from chainfed_ray.errors import InvalidJob
from chainfed_ray.serving.messages import SCHEMA, Sampling

_COLDEST = 1e-5  # below this temperature, dividing the logits by it may overflow; the likeliest token is taken instead


class Sampler:
    """Chooses the tokens of one text, as ``sampling`` says; with a ``grammar``, among those that it allows."""

    def __init__(self, sampling: Sampling, grammar: LLMatcher | None = None) -> None:
        self._sampling, self._grammar = sampling, grammar
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    @property
    def is_complete(self) -> bool:
        """True if no token can follow, because the text matches its grammar as it is."""
        return self._grammar is not None and self._grammar.is_stopped()

    def choose(self, logits: Tensor) -> int:
        """A token, from the logits of all tokens, [V].

        Raises:
            InvalidJob: the grammar is too large to be followed any further.
        """
        if self._grammar is None:
            return self._chosen(logits)
        token = self._chosen(logits.masked_fill(~_allowed(self._grammar, len(logits)), -torch.inf))
        self._grammar.consume_token(token)
        if self._grammar.is_error():
            why = self._grammar.get_error().splitlines()[0]
            raise InvalidJob.at(SCHEMA, "the schema", f"one that can be followed to the end of the answer ({why})")
        return token

    def _chosen(self, logits: Tensor) -> int:
        if self._sampling.temperature < _COLDEST:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.float() / self._sampling.temperature, -1)
        if self._sampling.top_p < 1:
            probabilities = _likeliest(probabilities, self._sampling.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._random))


def _allowed(grammar: LLMatcher, tokens: int) -> Tensor:
    """Which of the ``tokens`` may come next, [V]."""
    bits = np.unpackbits(np.frombuffer(grammar.compute_bitmask(), np.uint8), bitorder="little")
    allowed = np.zeros(tokens, bool)
    allowed[: len(bits)] = bits[:tokens]
    return torch.from_numpy(allowed)


def _likeliest(probabilities: Tensor, share: float) -> Tensor:
    """Keep the fewest tokens that together have the probability ``share``: at least one. The others become 0."""
    ordered, tokens = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, tokens, ordered.where(before < share, 0.0))
