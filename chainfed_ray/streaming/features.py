"""Stores pooled features: the mean over the tokens of each base layer's output, for every example of a client.

A head in closed form is fitted to them, and a CKA profile compares them. They are D numbers for each layer and example. The
activations (``prefix.py``) are T times larger, so features can be kept on disk for every layer.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

_FLOAT32 = 4


class PooledFeatures:
    """The features of a client's examples, with D = ``width``, in one file of ``folder`` for each layer.

    A file is named for the layer and for ``variant``: how the layer was run, which its bits depend on.
    """

    def __init__(self, folder: Path, variant: str, width: int) -> None:
        self._folder, self._variant, self._width = folder, variant, width

    def forget_other_variants(self) -> None:
        """Delete features that were made in another way: a client whose plan has changed cannot use them."""
        for path in self._folder.glob("*.features"):
            if not path.name.endswith(f"-{self._variant}.features"):
                path.unlink(missing_ok=True)

    def forget(self, layer: int) -> None:
        """Delete the features of ``layer``."""
        self._path(layer).unlink(missing_ok=True)

    def has(self, layer: int) -> bool:
        """True if the features of ``layer`` are complete."""
        return self._path(layer).exists()

    @contextmanager
    def writer(self, layer: int) -> Iterator["FeatureWriter"]:
        """Open a writer for the features of ``layer``. They exist once the block has ended without an error."""
        path = self._path(layer)
        # The file's name has the process's id, because a process that was given up may still be writing the same features.
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with aside.open("wb") as file:
            yield FeatureWriter(file, self._width)
        aside.replace(path)

    def of(self, layers: Iterable[int], indices: np.ndarray) -> Tensor:
        """The features of the examples at ``indices`` at some layers, [n, r, D] in float32."""
        return torch.stack([self.at(layer, indices) for layer in layers], 1)

    def at(self, layer: int, indices: np.ndarray) -> Tensor:
        """The features of the examples at ``indices`` at one layer, [n, D] in float32."""
        rows = np.empty((len(indices), self._width), dtype=np.float32)
        with self._path(layer).open("rb", buffering=0) as file:
            for row, index in zip(rows, indices.tolist(), strict=True):
                file.seek(index * row.nbytes)
                if file.readinto(row.data) != row.nbytes:
                    raise OSError(f"the features of layer {layer} end within example {index}")
        return torch.from_numpy(rows)

    def _path(self, layer: int) -> Path:
        return self._folder / f"{layer:04d}-{self._variant}.features"


class FeatureWriter:
    """Writes the features of examples to their places in a file."""

    def __init__(self, file: BinaryIO, width: int) -> None:
        self._file, self._row_bytes = file, width * _FLOAT32

    def put(self, indices: np.ndarray, means: Tensor) -> None:
        """Write ``means`` [n, D] in float32, the features of the examples at ``indices``."""
        for index, row in zip(indices.tolist(), means.numpy(), strict=True):
            self._file.seek(index * self._row_bytes)
            self._file.write(row.tobytes())
