"""Classifies texts, and embeds them, with finished stacks on a base model that stays in memory."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from chainfed_ray.data.tokens import Batch, Examples, check_known, joined, tokenize
from chainfed_ray.hub import tokenizer
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import through_model
from chainfed_ray.model.pooling import mean_over_tokens
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.model.source import weights_folder
from chainfed_ray.serving.messages import Embedding
from chainfed_ray.serving.stack_batch import RowStacks, StackBatch

_MOST_TOKENS = 512  # of a text that is embedded with the base model alone, if the model has as many positions
_TOKENS = 256  # of a padded batch: on a processor, larger ones are slower, because less of them stays in its cache


class Classifier:
    """The base model ``base``, loaded once with all its layers, or the lowest ``count``. Each call names the stacks to use.

    If the layers are in memory already, as ``held``, their weights are used and not loaded again.
    It is not thread-safe: callers make one call at a time.

    Raises:
        InvalidJob: there is no such base model.
    """

    def __init__(
        self, base: str, dtype: torch.dtype, count: int | None = None, held: Sequence[nn.Module] | None = None
    ) -> None:
        folder = weights_folder(base)
        self._tokenizer = tokenizer(base, folder)
        self._blocks = Blocks(folder, dtype)
        indices = range(self._blocks.num_layers if count is None else count)
        if held is None:
            self._layers = [self._blocks.load_layer(index) for index in indices]
        else:
            self._layers = [self._blocks.with_weights_of(index, held[index]) for index in indices]

    def probabilities(self, saved: SavedStack, texts: Sequence[str]) -> Tensor:
        """The probability of each class for each text, [n, C]. See ``of_each``."""
        return self.of_each([(saved, texts)])[0]

    def of_each(self, asked: Sequence[tuple[SavedStack, Sequence[str]]]) -> list[Tensor]:
        """For each stack and its n texts, the probability of each of its C classes for each text, [n, C].

        All texts are run together, each through its own stack. Up to rounding, a text's probabilities do not depend on the
        other texts of the call, nor on the other stacks.
        """
        owners = [saved for saved, texts in asked for _ in texts]
        examples = joined([self._tokens("texts", texts, saved.max_length) for saved, texts in asked])
        found: list[Tensor] = [torch.empty(0)] * len(owners)
        for run, indices in self._batches(examples, owners):
            rows = [owners[index] for index in indices]
            for index, logits, saved in zip(
                indices, self._logits(examples.batch(indices), rows, run), rows, strict=True
            ):
                found[index] = torch.softmax(logits[: len(saved.classes)], -1)
        answers = iter(found)
        return [torch.stack(list(islice(answers, len(texts)))) for _, texts in asked]

    def embeddings(self, asked: Sequence[tuple[SavedStack | None, Sequence[str]]]) -> list[list[Embedding]]:
        """For each stack, or the base model alone, and its texts, the embedding of each text.

        It is the mean over the text's tokens of the model's output, with length 1, as sentence-transformers computes it.
        """
        owners = [saved for saved, texts in asked for _ in texts]
        examples = joined([self._tokens("input", texts, self._most_tokens(saved)) for saved, texts in asked])
        found: list[Embedding] = [Embedding([], 0)] * len(owners)
        for run, indices in self._batches(examples, owners):
            vectors = self._vectors(examples.batch(indices), [owners[index] for index in indices], run)
            for index, vector in zip(indices, vectors, strict=True):
                found[index] = Embedding(vector.tolist(), int(examples.lengths[index]))
        answers = iter(found)
        return [list(islice(answers, len(texts))) for _, texts in asked]

    def _tokens(self, field: str, texts: Sequence[str], most: int) -> Examples:
        examples = tokenize(self._tokenizer, texts, [0] * len(texts), most)
        check_known(self._tokenizer, field, examples.ids, self._blocks.vocabulary)
        return examples

    def _batches(
        self, examples: Examples, owners: Sequence[SavedStack | None]
    ) -> Iterator[tuple[Sequence[nn.Module], np.ndarray]]:
        """The layers that a batch runs through, and the indices of its examples. Early exits have batches of their own."""
        places = defaultdict[int, list[int]](list)
        for place, saved in enumerate(owners):
            places[(saved and saved.run_layers) or self._blocks.num_layers].append(place)
        for count, own in places.items():
            assert count <= len(self._layers), "as many are loaded as a stack needs"
            for indices in examples.by_tokens(_TOKENS, np.array(own)):
                yield self._layers[:count], indices

    def _most_tokens(self, saved: SavedStack | None) -> int:
        return saved.max_length if saved else min(self._blocks.positions or _MOST_TOKENS, _MOST_TOKENS)

    @torch.no_grad()
    def _vectors(self, batch: Batch, owners: Sequence[SavedStack | None], layers: Sequence[nn.Module]) -> Tensor:
        """The embeddings of a batch that runs through ``layers``, [B, D]."""
        stacks = RowStacks([saved.stack if saved else None for saved in owners])
        states = through_model(self._blocks, stacks, enumerate(layers), batch)
        finished = self._blocks.finish(states.hidden, batch.mask)
        return nn.functional.normalize(mean_over_tokens(finished.float(), batch.mask), dim=-1)

    @torch.no_grad()
    def _logits(self, batch: Batch, owners: Sequence[SavedStack], layers: Sequence[nn.Module]) -> Tensor:
        """The logits of a batch [B, C] whose rows have the stacks of ``owners``, and run through ``layers``."""
        stacks = [saved.stack for saved in owners]
        alone = all(stack is stacks[0] for stack in stacks)
        stack: AdapterStack | StackBatch = stacks[0] if alone else StackBatch(stacks)
        states = through_model(self._blocks, stack, enumerate(layers), batch)
        assert stack.head is not None, "a classifier's stack has a head"
        logits: Tensor = stack.head(states.hidden, batch.mask, states.pooled)
        return logits
