"""The keys and values of texts that are written together. Texts join and leave while the others go on.

Rows are aligned at their ends: the last column is the last token of every row, and a shorter row begins with columns that its
attention mask hides. So a step adds one column for all rows, whatever their lengths, and a model's own attention can be used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_SPARE_COLUMNS = 64  # are kept free at the end, so that not every step copies what is there


class RowCache(Cache):  # type: ignore[misc]  # transformers' base classes have no types
    """The cache of B rows and S columns, for models all of whose layers attend to keys and values of [B, H, S, D]."""

    layers: "list[_Layer]"  # type: ignore[assignment]  # transformers' list may have layers of several kinds

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    @property
    def columns(self) -> int:
        """How many tokens the longest row has."""
        return int(self.get_seq_length())

    def join(self, other: "RowCache") -> None:
        """Add the rows of ``other`` below these."""
        if not self.layers:
            self.layers = other.layers
            return
        for layer, joining in zip(self.layers, other.layers, strict=True):
            layer.hold(_below(layer.keys, joining.keys), _below(layer.values, joining.values))

    def keep(self, rows: Sequence[int], columns: int) -> None:
        """Keep only ``rows``, in this order, and the last ``columns`` of them."""
        indices = torch.tensor(rows)
        for layer in self.layers:
            layer.hold(layer.keys[indices, :, -columns:], layer.values[indices, :, -columns:])


class _Layer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of one layer, at the beginning of buffers that have columns to spare."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """Add columns, [B, H, new, D]. Returns all keys and values, [B, H, S, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.hold(key_states, value_states)
            return self.keys, self.values
        held, new = self.keys.shape[-2], key_states.shape[-2]
        if held + new > self._buffers[0].shape[-2]:
            self.hold(self.keys, self.values, spare=new + _SPARE_COLUMNS)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, held : held + new] = states
        self.keys, self.values = (buffer[:, :, : held + new] for buffer in self._buffers)
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor, spare: int = _SPARE_COLUMNS) -> None:
        """Copy these keys and values into new buffers with ``spare`` columns at their end."""
        columns = keys.shape[-2]
        self._buffers = [
            states.new_empty(*states.shape[:2], columns + spare, states.shape[3]) for states in (keys, values)
        ]
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, :columns] = states
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self._buffers)


def _below(upper: Tensor, lower: Tensor) -> Tensor:
    """Rows one below the other, [B, H, S, D]. The shorter ones begin with zeros, which masks hide."""
    columns = max(upper.shape[-2], lower.shape[-2])
    both = upper.new_zeros(len(upper) + len(lower), upper.shape[1], columns, upper.shape[3])
    both[: len(upper), :, columns - upper.shape[-2] :] = upper
    both[len(upper) :, :, columns - lower.shape[-2] :] = lower
    return both
