"""Tokenised examples without padding: tokens end to end, and the offsets where examples begin. Only a batch is padded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chainfed_ray.activity import SILENT, Reporter
from chainfed_ray.errors import InvalidJob

REPORTED_ROWS = 500  # rows tokenised between two progress reports, at most
_CHARACTERS_AT_ONCE = 4_000_000  # of rows that are tokenised together
_TOKENS_OF_A_PART = 64  # what it costs to run a part of a batch by itself, as tokens that go along


class Batch(NamedTuple):
    """Examples, padded on the right to the length of the longest."""

    ids: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] int64, 1 for a real token
    labels: Tensor  # [B] int64
    targets: Tensor | None = None  # [B, T] bool: the tokens that a language model is to predict


@dataclass(frozen=True)
class ExampleCounts:
    """What a plan must know of examples: how many there are, and the tokens of the longest and of all."""

    examples: int
    longest: int
    tokens: int


@dataclass(frozen=True)
class Examples:
    """n examples: their tokens end to end, where each begins, their classes, and which tokens are to be predicted."""

    ids: np.ndarray  # [tokens] int32
    offsets: np.ndarray  # [n + 1] int64
    labels: np.ndarray  # [n] int64
    targets: np.ndarray | None = None  # [tokens] bool; never an example's first token

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example, [n]."""
        return np.diff(self.offsets)

    @property
    def counts(self) -> ExampleCounts:
        """How many there are, and how long."""
        return ExampleCounts(len(self), int(self.lengths.max(initial=0)), len(self.ids))

    def by_length(self, count: int, among: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """The indices of all examples, or those ``among`` them, in batches of ``count``, by length.

        Batches of like lengths need little padding.
        """
        indices = np.arange(len(self)) if among is None else among
        order = indices[np.argsort(self.lengths[indices], kind="stable")]
        return (order[first : first + count] for first in range(0, len(order), count))

    def by_tokens(self, most: int, among: np.ndarray) -> Iterator[np.ndarray]:
        """The indices ``among`` in batches, by length. A padded batch has at most ``most`` tokens, or one example."""
        chosen: list[int] = []
        for index in among[np.argsort(self.lengths[among], kind="stable")]:
            if chosen and (len(chosen) + 1) * self.lengths[index] > most:
                yield np.array(chosen)
                chosen = []
            chosen.append(index)
        if chosen:
            yield np.array(chosen)

    @property
    def every_token(self) -> np.ndarray:
        """The targets of running text, [tokens] bool: every token except each example's first."""
        targets = np.ones(len(self.ids), dtype=bool)
        targets[self.offsets[:-1]] = False
        return targets

    def take(self, indices: np.ndarray) -> "Examples":
        """The examples at ``indices``, in that order."""
        ids, targets = self._rows(self.ids, indices), None
        if self.targets is not None:
            targets = self._rows(self.targets, indices)
        return ragged(ids, self.labels[indices], targets)

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples at ``indices`` as padded tensors."""
        lengths = self.lengths[indices]
        ids = self._padded(self.ids, indices, torch.int64)
        mask = torch.arange(ids.shape[1])[None, :] < torch.from_numpy(lengths)[:, None]
        targets = None if self.targets is None else self._padded(self.targets, indices, torch.bool)
        return Batch(ids, mask.to(torch.int64), torch.from_numpy(self.labels[indices]), targets)

    def _rows(self, values: np.ndarray, indices: np.ndarray) -> list[np.ndarray]:
        return [values[self.offsets[index] : self.offsets[index + 1]] for index in indices]

    def _padded(self, values: np.ndarray, indices: np.ndarray, dtype: torch.dtype) -> Tensor:
        """The rows of ``values`` [tokens] at ``indices`` as [B, T], with zeros at the right."""
        rows = self._rows(values, indices)
        padded = torch.zeros(len(rows), max(map(len, rows)), dtype=dtype)
        for row, given in zip(padded, rows, strict=True):
            row[: len(given)] = torch.from_numpy(given.astype(bool if dtype == torch.bool else np.int64))
        return padded


NO_EXAMPLES = Examples(np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64))
"""No examples, such as the server has of a client whose rows are at a site."""


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[int],
    max_length: int,
    reporter: Reporter = SILENT,
) -> Examples:
    """Tokenise ``texts``, cut at ``max_length`` tokens. A text without tokens gets one padding token."""
    rows = list[np.ndarray]()
    for part in reporter.each(_parts(texts), len(texts), "rows", len):
        encoded = tokenizer(part, truncation=True, max_length=max_length)["input_ids"]
        rows += [np.array(row or [0], dtype=np.int32) for row in encoded]
    return ragged(rows, np.array(labels, dtype=np.int64))


def of_like_length(lengths: np.ndarray) -> list[slice]:
    """Cut a batch whose examples have ascending ``lengths`` [B] into parts, so that least is spent on padding.

    A part is padded to its own longest example. Each costs something of its own, so lengths that are nearly alike stay
    together. The cut is the best one, by dynamic programming.
    """
    least, begins = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, dtype=np.int64)
    for end in range(1, len(lengths) + 1):
        tokens = (end - np.arange(end)) * lengths[end - 1]
        costs = least[:end] + tokens + _TOKENS_OF_A_PART
        begins[end] = costs.argmin()
        least[end] = costs[begins[end]]
    parts, end = list[slice](), len(lengths)
    while end:
        parts.append(slice(int(begins[end]), end))
        end = int(begins[end])
    return parts[::-1]


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in parts, each of so few rows and characters that its tokens need little memory before they are cut."""
    part, characters = list[str](), 0
    for text in texts:
        if part and (len(part) == REPORTED_ROWS or characters + len(text) > _CHARACTERS_AT_ONCE):
            yield part
            part, characters = [], 0
        part.append(text)
        characters += len(text)
    if part:
        yield part


def check_known(
    tokenizer: PreTrainedTokenizerBase, field: str, ids: Sequence[int] | np.ndarray, vocabulary: int
) -> None:
    """Check that a model with ``vocabulary`` tokens knows all of ``ids``, of the text that the key ``field`` names.

    Some tokenizers have special tokens that their models have not, and a text may spell them out.

    Raises:
        InvalidJob: it does not know one of them.
    """
    if len(ids) and (highest := int(np.max(ids))) >= vocabulary:
        expected = f"a text without it: the model has {vocabulary} tokens, and this would be number {highest}"
        raise InvalidJob.at(field, str(tokenizer.convert_ids_to_tokens(highest)), expected)


def ragged(rows: list[np.ndarray], labels: np.ndarray, targets: list[np.ndarray] | None = None) -> Examples:
    """Examples from ``rows`` of token ids. ``targets`` has the same lengths, and says which tokens are to be predicted."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    ids = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
    wanted = None if targets is None else np.concatenate([*targets, np.zeros(0, dtype=bool)])
    return Examples(ids.astype(np.int32), offsets, labels, wanted)


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of all ``parts``, one part after the other. None of them has targets."""
    rows = [part.ids[start:end] for part in parts for start, end in pairwise(part.offsets)]
    return ragged(rows, np.concatenate([part.labels for part in parts]))
