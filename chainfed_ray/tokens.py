"""Tokenised examples, ragged: no padding is kept, sent or cached."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class Batch(NamedTuple):
    """Examples padded on the right to the longest of them."""

    ids: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] int64, 1 for a real token
    labels: Tensor  # [B] int64


@dataclass(frozen=True)
class Examples:
    """n examples: their tokens end to end, where each begins, and their classes."""

    ids: np.ndarray  # [tokens] int32
    offsets: np.ndarray  # [n + 1] int64
    labels: np.ndarray  # [n] int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each example, [n]."""
        return np.diff(self.offsets)

    def by_length(self, count: int) -> Iterator[np.ndarray]:
        """The indices of every example, ``count`` of like length at a time: so that little of a batch is padding."""
        order = np.argsort(self.lengths, kind="stable")
        return (order[first : first + count] for first in range(0, len(order), count))

    def take(self, indices: np.ndarray) -> "Examples":
        """Some of the examples, in the order of ``indices``."""
        rows = [self.ids[self.offsets[index] : self.offsets[index + 1]] for index in indices]
        return _ragged(rows, self.labels[indices])

    def batch(self, indices: np.ndarray) -> Batch:
        """Some of the examples as padded tensors."""
        lengths = self.lengths[indices]
        ids = torch.zeros(len(indices), int(lengths.max()), dtype=torch.int64)
        for row, index, length in zip(ids, indices, lengths, strict=True):
            start = self.offsets[index]
            row[:length] = torch.from_numpy(self.ids[start : start + length].astype(np.int64))
        mask = torch.arange(ids.shape[1])[None, :] < torch.from_numpy(lengths)[:, None]
        return Batch(ids, mask.to(torch.int64), torch.from_numpy(self.labels[indices]))


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], labels: Sequence[int], max_length: int
) -> Examples:
    """The examples of ``texts``, cut at ``max_length`` tokens; a text without tokens keeps one padding token."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return _ragged([np.array(row or [0], dtype=np.int32) for row in encoded], np.array(labels, dtype=np.int64))


def _ragged(rows: list[np.ndarray], labels: np.ndarray) -> Examples:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    ids = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
    return Examples(ids.astype(np.int32), offsets, labels)
