"""Looks for weights that are no numbers, before anything is trained with them.

A checkpoint of up to 2 GiB is read whole. Of a larger one as much is read: the same share of every tensor, in pieces spread
evenly over it. A training run that diverged leaves whole tensors without numbers, and these are found by any piece.
"""

import math
from collections.abc import Iterable

import torch

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.streaming.checkpoint import Checkpoint

_LOOKED_AT = 2 * 2**30  # bytes of a checkpoint
_PIECE = 2**20  # bytes


def check_numbers(checkpoint: Checkpoint, names: Iterable[str], looked_at: int = _LOOKED_AT) -> None:
    """Look at the tensors called ``names``, and read about ``looked_at`` bytes of them.

    Raises:
        UnsupportedModel: one of them has NaN or an infinite number.
    """
    real = [name for name in names if checkpoint.dtype(name).is_floating_point and checkpoint.shape(name)]
    share = min(1.0, looked_at / max(sum(map(checkpoint.stored_bytes, real)), 1))
    for name in real:
        count, row = checkpoint.shape(name)[0], checkpoint.row_bytes(name)
        step = max(_PIECE // max(row, 1), 1)
        buffer = torch.empty(min(step, count) * row, dtype=torch.uint8)
        for piece, first in enumerate(range(0, count, step)):
            if piece and math.floor(piece * share) == math.floor((piece - 1) * share):
                continue
            rows = checkpoint.slice(name, first, min(step, count - first), buffer, checkpoint.dtype(name))
            if rows.dtype == torch.float64:  # whose numbers may be too large for the dtypes of jobs
                rows = rows.float()
            if not _all_finite(rows):
                raise UnsupportedModel(
                    str(checkpoint.folder), f"{name} has weights that are no numbers (NaN or infinite)"
                )


def _all_finite(numbers: torch.Tensor) -> bool:
    """True if there is no NaN and nothing infinite. ``isfinite`` makes three tensors as large, and takes nine times as long."""
    # The least and the greatest are NaN if anything is.
    return not numbers.numel() or all(bool(end.isfinite()) for end in numbers.aminmax())
