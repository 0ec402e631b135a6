"""The prefix cache: the frozen layers below a window run once, not in every training step.

While a window is trained, nothing below it changes, and neither do the weights of its bottom layer. So the cache keeps that
layer's *output* u_m, before its adapter, and a training step holds no base layer for it. When the window slides, the cache
advances by one layer: it runs adapter m and then layer m + 1 over the client's examples. While one layer computes, the next is
loaded; or matrices are streamed, and no layer is ever in memory.

Examples always run in the same micro-batches and in the same order, so an activation does not depend on who asks for it or
when: a cache that was lost is made again bit for bit. A client without the disk for a cache recomputes the prefix in each step,
one example at a time. Those are the bits of a cache that is made one example at a time.
"""

import os
import shutil
import weakref
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from chainfed_ray.activity import SILENT, Reporter
from chainfed_ray.budget.footprint import WeightPlacement
from chainfed_ray.budget.planner import PREFIX_BATCH
from chainfed_ray.data.tokens import Examples
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import embed, through_adapter, through_layer
from chainfed_ray.model.pooling import LayerStates, mean_over_tokens
from chainfed_ray.streaming.features import FeatureWriter, PooledFeatures
from chainfed_ray.streaming.matrices import RowSlices


class Activations(Protocol):
    """A source of one layer's output for every example of a client."""

    def batch(self, indices: np.ndarray) -> LayerStates:
        """The states of the examples at ``indices``, with zeros at padding and the pooled features that the head uses."""
        ...


@dataclass(frozen=True)
class PrefixRunner:
    """Runs a base model's layers without gradients, ``batch`` examples at a time, with resident layers or streamed matrices."""

    blocks: Blocks
    batch: int = PREFIX_BATCH
    matrices: RowSlices | None = None  # None: layers are loaded whole

    @property
    def variant(self) -> str:
        """How activations are made: the placement of weights and the batch. Their bits depend on it."""
        weights: WeightPlacement = "streamed" if self.matrices else "resident"
        return f"{weights}-{self.batch}"

    def layers(self, indices: Iterable[int]) -> Iterator[tuple[int, nn.Module]]:
        """Load layers one after the other. While one is used, the next is loaded."""
        wanted = list(indices)
        if self.matrices or len(wanted) < 2:
            yield from ((index, self.blocks.load_layer(index, self.matrices)) for index in wanted)
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="load-ahead") as thread:
            ahead = thread.submit(self.blocks.load_layer, wanted[0])
            for place, index in enumerate(wanted):
                layer = ahead.result()
                if place + 1 < len(wanted):
                    ahead = thread.submit(self.blocks.load_layer, wanted[place + 1])
                else:
                    del ahead
                yield index, layer
                del layer

    def run(
        self,
        index: int,
        layer: nn.Module,
        stack: AdapterStack,
        examples: Examples,
        indices: np.ndarray,
        below: LayerStates | None,
    ) -> LayerStates:
        """The output u of layer ``index``, from the states of the layer ``below`` it; None for layer 0, which starts from the
        embeddings.
        """
        # Not a decorator, because that would keep the arguments alive while the layer runs.
        with torch.no_grad():
            batch = examples.batch(indices)
            if below is None:
                states, calls = embed(self.blocks, batch)
            else:
                states, calls = below, self.blocks.calls(batch.mask)
                del below  # the last other reference, so that it is freed as soon as the adapter has run
                # Identity adapters are skipped, and the cache's file names ignore them too.
                if index - 1 in stack.layers and not stack.part(index - 1).is_identity:
                    states = through_adapter(stack, index - 1, states)
            return through_layer(self.blocks, stack, index, layer, calls[index], states, batch.mask)


class PrefixCache:
    """The activations of ``examples`` at the output of one layer at a time, in files in ``folder``.

    A file's name has its layer, a digest of the trained adapters below, the number of layers that the head uses, and how it was
    made. A stack that differs in one of them finds no file, never a wrong one. A file has a row for every token, and after
    these the pooled features of the layers below for every example.
    """

    def __init__(self, folder: Path, runner: PrefixRunner, examples: Examples) -> None:
        self._folder, self._runner, self._examples = folder, runner, examples
        self.width = runner.blocks.hidden_size  # D
        self.features = PooledFeatures(folder, runner.variant, self.width)
        self._row_bytes = self.width * runner.blocks.dtype.itemsize
        folder.mkdir(parents=True, exist_ok=True)

    def at(
        self, layer: int, stack: AdapterStack, keep: int | None = None, reporter: Reporter = SILENT
    ) -> "Activations":
        """The activations u of ``layer``, made from the highest cached layer below it.

        Other layers' files are deleted, except those that will be needed again: the layer ``keep``, and the chain's lowest
        layer, below which nothing ever changes. The layer -1 stands for the embeddings, which are not cached.
        """
        if layer < 0:
            return EmbeddedTexts(self._runner.blocks, self._examples)
        have = self._highest_cached(layer, stack)
        lasting = {keep, stack.below(min(stack.layers)) if stack.layers else layer}
        self.forget_all_but({have, *lasting}, stack)
        missing = range(have + 1, layer + 1)
        for index, module in reporter.each(self._runner.layers(missing), len(missing), "layers"):
            self._write(index, module, stack)
            del module  # free it before another layer is loaded
            self.forget_all_but({index, *lasting}, stack)
        return self._open(layer, stack)

    def first_pass(self, below: int, top: int, bare: AdapterStack) -> Iterator[int]:
        """Run layers of the base model up to ``top``, and yield each when its activations and features are written.

        The first layer run is the one after the highest that is cached at or below ``below``. ``bare`` is a stack without
        adapters.
        """
        have = self._highest_cached(below, bare)
        for index, module in self._runner.layers(range(have + 1, top + 1)):
            with self.features.writer(index) as writer:
                self._write(index, module, bare, writer)
            del module  # free it before another layer is loaded
            yield index

    def clear(self) -> None:
        """Delete the cache's folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, layer: int, stack: AdapterStack) -> Path:
        return (
            self._folder / f"{layer:04d}-{_digest(stack, layer)}-{stack.head_layers}-{self._runner.variant}.activations"
        )

    def _open(self, layer: int, stack: AdapterStack) -> "CachedActivations":
        rows = min(layer, stack.pooled_layers)
        return CachedActivations(self._path(layer, stack), self._runner.blocks, self._examples, rows)

    def forget_all_but(self, layers: Collection[int | None], stack: AdapterStack) -> None:
        """Delete the activations of all layers except ``layers``, and those of other stacks."""
        kept = {self._path(layer, stack) for layer in layers if layer is not None and layer >= 0}
        for path in self._folder.glob("*.activations"):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _highest_cached(self, layer: int, stack: AdapterStack) -> int:
        """The highest layer up to ``layer`` whose activations are cached; −1 if there is none."""
        return next((have for have in range(layer, -1, -1) if self._path(have, stack).exists()), -1)

    def _write(self, layer: int, module: nn.Module, stack: AdapterStack, features: FeatureWriter | None = None) -> None:
        path, examples = self._path(layer, stack), self._examples
        below = self._open(layer - 1, stack) if layer else None
        # The file's name has the process's id, because a process that was given up may still be writing the same activations.
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with aside.open("wb") as file:
            for indices in examples.by_length(self._runner.batch):
                # No variable holds the states, so that each batch is freed before the next is made.
                self._store(
                    file,
                    indices,
                    self._runner.run(layer, module, stack, examples, indices, below.batch(indices) if below else None),
                    features,
                )
        aside.replace(path)

    def _store(self, file: BinaryIO, indices: np.ndarray, states: LayerStates, features: FeatureWriter | None) -> None:
        lengths = self._examples.lengths[indices]
        for index, length, row, pooled in zip(indices.tolist(), lengths.tolist(), *states, strict=True):
            file.seek(int(self._examples.offsets[index]) * self._row_bytes)
            file.write(row[:length].contiguous().view(torch.uint8).numpy())
            if len(pooled):
                file.seek(int(self._examples.offsets[-1]) * self._row_bytes + index * pooled.nbytes)
                file.write(pooled.contiguous().view(torch.uint8).numpy())
        if features:
            mask = torch.arange(states.hidden.shape[1]) < torch.from_numpy(lengths)[:, None]
            features.put(indices, mean_over_tokens(states.hidden.float(), mask))


class CachedActivations:
    """Reads one layer's output from its file, row by row, for each real token of each example. Nothing is memory-mapped.

    The file also has the features of ``pooled`` layers below for each example.
    """

    def __init__(self, path: Path, blocks: Blocks, examples: Examples, pooled: int) -> None:
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._width, self._dtype, self._examples, self._pooled = blocks.hidden_size, blocks.dtype, examples, pooled

    def batch(self, indices: np.ndarray) -> LayerStates:
        """See ``Activations``."""
        offsets, lengths = self._examples.offsets, self._examples.lengths[indices]
        hidden = torch.zeros(len(indices), int(lengths.max()), self._width, dtype=self._dtype)
        pooled = torch.empty(len(indices), self._pooled, self._width)
        stride = self._width * self._dtype.itemsize
        for place, (index, length) in enumerate(zip(indices.tolist(), lengths.tolist(), strict=True)):
            self._fill(hidden[place, :length], int(offsets[index]) * stride, index)
            if self._pooled:
                self._fill(pooled[place], int(offsets[-1]) * stride + index * pooled[place].nbytes, index)
        return LayerStates(hidden, pooled)

    def _fill(self, rows: Tensor, position: int, index: int) -> None:
        data: Any = rows.view(-1).view(torch.uint8).numpy()
        view = memoryview(data)
        if os.preadv(self._file, [view], position) != len(view):
            raise OSError(f"the prefix cache ends within example {index}")


@dataclass(frozen=True)
class EmbeddedTexts:
    """Embeds examples whenever they are needed: what enters the model's lowest layer."""

    blocks: Blocks
    examples: Examples

    @torch.no_grad()
    def batch(self, indices: np.ndarray) -> LayerStates:
        """See ``Activations``."""
        states, _ = embed(self.blocks, self.examples.batch(indices))
        return states


@dataclass(frozen=True)
class RecomputedActivations:
    """Recomputes the output of ``layer`` whenever it is needed, for a client without the disk for a cache."""

    layer: int
    stack: AdapterStack
    runner: PrefixRunner
    examples: Examples

    def batch(self, indices: np.ndarray) -> LayerStates:
        """See ``Activations``."""
        states: dict[int, LayerStates] = {}
        for layer, module in self.runner.layers(range(self.layer + 1)):
            for index in indices.tolist():
                states[index] = self.runner.run(
                    layer, module, self.stack, self.examples, np.array([index]), states.pop(index, None)
                )
            del module  # free it before another layer is loaded
        lengths = self.examples.lengths[indices]
        width, dtype = self.runner.blocks.hidden_size, self.runner.blocks.dtype
        pooled = torch.cat([states[index].pooled for index in indices.tolist()])
        hidden = torch.zeros(len(indices), int(lengths.max()), width, dtype=dtype)
        for row, index, length in zip(hidden, indices.tolist(), lengths.tolist(), strict=True):
            row[:length] = states.pop(index).hidden[0]
        return LayerStates(hidden, pooled)


def _digest(stack: AdapterStack, layer: int) -> str:
    """A digest of the trained adapters on which the output of ``layer`` depends."""
    digest = blake2b(digest_size=16)
    felt = (index for index in stack.layers if stack.below(index) < layer)
    for index in (index for index in felt if not stack.part(index).is_identity):
        for name, tensor in stack.part(index).state_dict().items():
            digest.update(f"{index}.{name}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
