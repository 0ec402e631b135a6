"""The base model that a process works with, and the folder for files that it derives from the model."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class ModelSource:
    """The folder and dtype of the base model, and the ``scratch`` folder for prefix caches and other temporary files."""

    folder: Path
    dtype: torch.dtype
    scratch: Path
