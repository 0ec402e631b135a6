"""The prefix cache: the frozen part below a window is run once, not in every step.

Below the window nothing changes while the window is trained, and neither do the weights of its bottom layer. So what is
kept is that layer's *output* u_m, before its adapter: a training step then holds no base layer for it. When the window
slides, the cache advances by one layer: adapter m, then layer m + 1, over the client's examples, with one layer in memory.

Examples are always run in the same micro-batches, in the same order, so that an activation does not depend on who asks for
it or when: a cache that was lost and made again is the same, bit for bit.
"""

import os
import shutil
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chainfed_ray.adapter import AdapterStack
from chainfed_ray.blocks import Blocks
from chainfed_ray.tokens import Examples

MICRO_BATCH = 8


class PrefixCache:
    """The activations of ``examples`` at the output of one layer at a time, in files in ``folder``.

    Each is named for its layer and for the adapters below it: a stack that differs there finds no file, never a wrong one.
    """

    def __init__(self, folder: Path, blocks: Blocks, examples: Examples) -> None:
        self._folder, self._blocks, self._examples = folder, blocks, examples
        self._row_bytes = blocks.hidden_size * blocks.dtype.itemsize
        folder.mkdir(parents=True, exist_ok=True)

    def at(self, layer: int, stack: AdapterStack) -> "Activations":
        """u of ``layer``: made from the highest layer at hand below it, one layer at a time."""
        have = layer
        while have >= 0 and not self._path(have, stack).exists():
            have -= 1
        if have < 0:
            self._write(self._path(0, stack), 0, None, stack)
            have = 0
        while have < layer:
            self._write(self._path(have + 1, stack), have + 1, self._path(have, stack), stack)
            have += 1
        self._forget_all_but(layer, stack)
        return Activations(self._path(layer, stack), self._blocks, self._examples)

    def clear(self) -> None:
        """Give the disk back."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, layer: int, stack: AdapterStack) -> Path:
        return self._folder / f"{layer:04d}-{_digest(stack, layer)}.activations"

    @torch.no_grad()
    def _write(self, path: Path, layer: int, below: Path | None, stack: AdapterStack) -> None:
        source = Activations(below, self._blocks, self._examples) if below else None
        module = self._blocks.load_layer(layer)
        # A name of its own: a process that was given up may still be writing the same activations.
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with aside.open("wb") as file:
            for indices in self._examples.by_length(MICRO_BATCH):
                batch = self._examples.batch(indices)
                if source is None:
                    hidden, calls = self._blocks.embed(batch.ids, batch.mask)
                else:
                    hidden, calls = source.batch(indices), self._blocks.calls(batch.mask)
                    if layer - 1 in stack.layers:
                        hidden = stack.adapter(layer - 1)(hidden)
                hidden = self._blocks.run(module, hidden, calls[layer])
                for index, row, length in zip(indices.tolist(), hidden, batch.mask.sum(1).tolist(), strict=True):
                    file.seek(int(self._examples.offsets[index]) * self._row_bytes)
                    file.write(row[:length].contiguous().view(torch.uint8).numpy().tobytes())
        aside.replace(path)

    def _forget_all_but(self, layer: int, stack: AdapterStack) -> None:
        """Keep ``layer`` and, for a window that wraps round, the bottom of the chain, below which nothing ever changes."""
        keep = {self._path(layer, stack), self._path(min(stack.layers, default=layer), stack)}
        for path in self._folder.glob("*.activations"):
            if path not in keep:
                path.unlink(missing_ok=True)


class Activations:
    """The output of one layer for each real token of each example, read row by row: never mapped, so never resident."""

    def __init__(self, path: Path, blocks: Blocks, examples: Examples) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self._width, self._dtype, self._examples = blocks.hidden_size, blocks.dtype, examples

    def batch(self, indices: np.ndarray) -> Tensor:
        """The activations [B, T, D] of some examples, zero where they are padded."""
        lengths = self._examples.lengths[indices]
        hidden = torch.zeros(len(indices), int(lengths.max()), self._width, dtype=self._dtype)
        stride = self._width * self._dtype.itemsize
        for row, index, length in zip(hidden, indices.tolist(), lengths.tolist(), strict=True):
            view = memoryview(row[:length].view(-1).view(torch.uint8).numpy())
            if os.preadv(self._file, [view], int(self._examples.offsets[index]) * stride) != len(view):
                raise OSError(f"the prefix cache ends within example {index}")
        return hidden

    def __del__(self) -> None:
        os.close(self._file)


def _digest(stack: AdapterStack, layer: int) -> str:
    """Of the adapters below ``layer``: what u of ``layer`` depends on besides the base model and the examples."""
    digest = blake2b(digest_size=16)
    for name, tensor in stack.state_dict().items():
        if name.startswith("adapters.") and int(name.split(".")[1]) < layer:
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
