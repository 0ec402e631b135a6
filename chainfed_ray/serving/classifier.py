"""Classifies texts with finished stacks on a base model that stays in memory."""

import numpy as np
import torch
from torch import Tensor

from chainfed_ray.data.tokens import Examples, tokenize
from chainfed_ray.hub import resolve, tokenizer
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import through_model
from chainfed_ray.model.saved_stack import SavedStack

_BATCH = 32


class Classifier:
    """The base model ``base``, loaded once with all its layers. Each call names the stack to use.

    It is not thread-safe: callers make one call at a time.

    Raises:
        InvalidJob: there is no such base model.
    """

    def __init__(self, base: str, dtype: torch.dtype) -> None:
        folder = resolve(base)
        self._tokenizer = tokenizer(base, folder)
        self._blocks = Blocks(folder, dtype)
        self._layers = [self._blocks.load_layer(index) for index in range(self._blocks.num_layers)]

    def probabilities(self, saved: SavedStack, texts: list[str]) -> Tensor:
        """The probability of each class for each text, [n, C].

        Up to rounding, a text's probabilities do not depend on the other texts of the call.
        """
        examples = tokenize(self._tokenizer, texts, [0] * len(texts), saved.max_length)
        logits = torch.empty(len(texts), len(saved.classes))
        for indices in examples.by_length(_BATCH):
            logits[torch.from_numpy(indices)] = self._logits(saved, examples, indices)
        return torch.softmax(logits, -1)

    @torch.no_grad()
    def _logits(self, saved: SavedStack, examples: Examples, indices: np.ndarray) -> Tensor:
        batch, stack = examples.batch(indices), saved.stack
        states = through_model(self._blocks, stack, enumerate(self._layers), batch)
        assert stack.head is not None, "a classifier's stack has a head"
        logits: Tensor = stack.head(states.hidden, batch.mask, states.pooled)
        return logits
