"""Pooled features: the mean over the tokens of each base layer's output, for every example of a client.

A head in closed form is fitted to them, and a CKA profile compares them. They are D numbers for each layer and example, so
they are kept on disk for every layer, beside the activations (prefix.py), which are T times larger.
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
    """The features of a client's examples with D = ``width``, in one file of ``folder`` for each layer.

    A file is named for the layer and for ``way``: how the layer was run, which its bits depend on.
    """

    def __init__(self, folder: Path, way: str, width: int) -> None:
        self._folder, self._way, self._width = folder, way, width

    def forget_other_ways(self) -> None:
        """Give the disk of features back that were made in another way: a client whose plan has changed has no use for them."""
        for path in self._folder.glob("*.features"):
            if not path.name.endswith(f"-{self._way}.features"):
                path.unlink(missing_ok=True)

    def forget(self, layer: int) -> None:
        """Give the disk of those of ``layer`` back."""
        self._path(layer).unlink(missing_ok=True)

    def has(self, layer: int) -> bool:
        """Whether those of ``layer`` are there."""
        return self._path(layer).exists()

    @contextmanager
    def written(self, layer: int) -> Iterator["FeatureWriter"]:
        """Where those of ``layer`` are put. They are there once the block has ended, and not before."""
        path = self._path(layer)
        # A name of its own: a process that was given up may still be writing the same features.
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with aside.open("wb") as file:
            yield FeatureWriter(file, self._width)
        aside.replace(path)

    def of(self, layers: Iterable[int], indices: np.ndarray) -> Tensor:
        """Those of some examples at some layers, [n, r, D] in float32."""
        return torch.stack([self.at(layer, indices) for layer in layers], 1)

    def at(self, layer: int, indices: np.ndarray) -> Tensor:
        """Those of some examples at one layer, [n, D] in float32."""
        rows = np.empty((len(indices), self._width), dtype=np.float32)
        with self._path(layer).open("rb", buffering=0) as file:
            for row, index in zip(rows, indices.tolist(), strict=True):
                file.seek(index * row.nbytes)
                if file.readinto(row.data) != row.nbytes:
                    raise OSError(f"the features of layer {layer} end within example {index}")
        return torch.from_numpy(rows)

    def _path(self, layer: int) -> Path:
        return self._folder / f"{layer:04d}-{self._way}.features"


class FeatureWriter:
    """Puts the features of examples at their places in a file."""

    def __init__(self, file: BinaryIO, width: int) -> None:
        self._file, self._row_bytes = file, width * _FLOAT32

    def put(self, indices: np.ndarray, means: Tensor) -> None:
        """Put ``means`` [n, D] in float32."""
        for index, row in zip(indices.tolist(), means.numpy(), strict=True):
            self._file.seek(index * self._row_bytes)
            self._file.write(row.tobytes())
