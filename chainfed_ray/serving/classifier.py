"""Classifies texts with finished stacks on a base model that stays in memory."""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from chainfed_ray.data.tokens import Batch, joined, tokenize
from chainfed_ray.hub import resolve, tokenizer
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import through_model
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.serving.stack_batch import StackBatch

_TOKENS = 256  # of a padded batch: on a processor, larger ones are slower, because less of them stays in its cache


class Classifier:
    """The base model ``base``, loaded once with all its layers. Each call names the stacks to use.

    It is not thread-safe: callers make one call at a time.

    Raises:
        InvalidJob: there is no such base model.
    """

    def __init__(self, base: str, dtype: torch.dtype) -> None:
        folder = resolve(base)
        self._tokenizer = tokenizer(base, folder)
        self._blocks = Blocks(folder, dtype)
        self._layers = [self._blocks.load_layer(index) for index in range(self._blocks.num_layers)]

    def probabilities(self, saved: SavedStack, texts: Sequence[str]) -> Tensor:
        """The probability of each class for each text, [n, C]. See ``of_each``."""
        return self.of_each([(saved, texts)])[0]

    def of_each(self, asked: Sequence[tuple[SavedStack, Sequence[str]]]) -> list[Tensor]:
        """For each stack and its n texts, the probability of each of its C classes for each text, [n, C].

        All texts are run together, each through its own stack. Up to rounding, a text's probabilities do not depend on the
        other texts of the call, nor on the other stacks.
        """
        owners = [saved for saved, texts in asked for _ in texts]
        examples = joined(
            [tokenize(self._tokenizer, texts, [0] * len(texts), saved.max_length) for saved, texts in asked]
        )
        found: list[Tensor] = [torch.empty(0)] * len(owners)
        for indices in examples.by_tokens(_TOKENS):
            rows = [owners[index] for index in indices]
            for index, logits, saved in zip(indices, self._logits(examples.batch(indices), rows), rows, strict=True):
                found[index] = torch.softmax(logits[: len(saved.classes)], -1)
        answers = iter(found)
        return [torch.stack(list(islice(answers, len(texts)))) for _, texts in asked]

    @torch.no_grad()
    def _logits(self, batch: Batch, owners: Sequence[SavedStack]) -> Tensor:
        """The logits of a batch [B, C] whose rows have the stacks of ``owners``."""
        stacks = [saved.stack for saved in owners]
        alone = all(stack is stacks[0] for stack in stacks)
        stack: AdapterStack | StackBatch = stacks[0] if alone else StackBatch(stacks)
        states = through_model(self._blocks, stack, enumerate(self._layers), batch)
        assert stack.head is not None, "a classifier's stack has a head"
        logits: Tensor = stack.head(states.hidden, batch.mask, states.pooled)
        return logits
