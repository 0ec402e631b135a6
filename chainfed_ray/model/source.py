"""Which base model a process works with, and where it may keep what it makes of it."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class ModelSource:
    """Which base model a turn streams, and where it may keep its prefix caches."""

    folder: Path
    dtype: torch.dtype
    scratch: Path
