"""Runs the whole model in a DeepSpeed engine (ZeRO-3), with the weights of its layers on disk.

A parameter is read from disk into a locked buffer when its module runs, and released afterwards. So the server that evaluates a
model may have far less memory than the model takes (Rajbhandari et al., *ZeRO-Infinity*, 2021). Each of n processes stores an
n-th of every parameter. All run the same modules at the same time, each on its own batches.

Embeddings, head and adapters are outside the engine. They are read as everywhere else: rows of the embedding tables, slices of
the head's matrix. A stack is an argument of ``evaluate``. This file imports DeepSpeed, and only when a model is loaded.
"""

import logging
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from chainfed_ray.client.turn import warm_up
from chainfed_ray.cluster.offload.footprint import SWAPPED_BYTES, buffer_count, buffer_elements
from chainfed_ray.cluster.offload.libraries import OPS, load_op
from chainfed_ray.data.tokens import Batch, Examples
from chainfed_ray.device.peak import PeakMemory
from chainfed_ray.device.removal import remove_when_this_process_ends
from chainfed_ray.evaluation.predictions import Predictions, predict
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import through_model
from chainfed_ray.model.pooling import LayerStates
from chainfed_ray.model.source import ModelSource
from chainfed_ray.units import format_bytes


class OffloadedModel:
    """The model in ``base``, with its layers on disk in the folder ``nvme``. A process may have one such model.

    ``nvme`` belongs to this process alone, and is emptied first. With several workers in a torch.distributed group, all make
    their model at the same time. ``alive`` is called after each layer that is loaded, and after each batch.

    Raises:
        OSError: the disk has no room for the layers.
    """

    def __init__(self, base: ModelSource, nvme: Path, ops: Path, alive: Callable[[], None]) -> None:
        shutil.rmtree(nvme, ignore_errors=True)
        nvme.mkdir(parents=True)
        self._nvme, self._alive = nvme, alive
        remove_when_this_process_ends(nvme)
        deepspeed = _deepspeed(ops)
        warm_up(base)
        with PeakMemory() as self._loading:
            self._blocks = Blocks(base.folder, base.dtype)
            self._rank = torch.distributed.get_rank()
            self._workers = torch.distributed.get_world_size()
            config = _config(self._blocks, nvme, self._workers)
            self._swapper = _swapper(config, self._blocks)
            layers = nn.ModuleList()
            for index in range(self._blocks.num_layers):
                layers.append(self._blocks.place_layer(index, lambda module: self._place(deepspeed, module, config)))
                alive()
            self._engine = deepspeed.initialize(model=_Chain(self._blocks, layers), config=config)[0]
            self._engine.eval()

    @torch.no_grad()
    def evaluate(self, stack: AdapterStack, examples: Examples, batch_size: int) -> "WorkerResult":
        """Predict this process's part of ``examples`` with ``stack``, in batches of ``batch_size`` examples of like length."""
        matrices = self._blocks.reader()
        predictions, mine, seconds = Predictions.blank(len(examples)), [torch.zeros(0, dtype=torch.int64)], 0.0
        try:
            with PeakMemory() as peak:
                for indices, counted in worker_batches(examples, batch_size, self._rank, self._workers):
                    started = perf_counter()
                    batch = examples.batch(indices)
                    predicted = predict(self._blocks, stack, self._engine(batch, stack), batch, matrices)
                    seconds += perf_counter() - started
                    if counted:
                        mine.append(torch.from_numpy(indices))
                        predictions.put(mine[-1], predicted)
                    self._alive()
        finally:
            matrices.close()
        highest = [one.highest for one in (self._loading, peak) if one.highest is not None]
        return WorkerResult(torch.cat(mine), predictions, seconds, self._peak_bytes(peak), max(highest, default=None))

    def close(self) -> None:
        """Release the engine and the locked buffers, and delete the files."""
        self._engine.destroy()
        self._swapper.aio_read_handle.free_cpu_locked_tensor(self._swapper.buffers)
        self._blocks.close()
        shutil.rmtree(self._nvme, ignore_errors=True)

    def _place(self, deepspeed: Any, module: nn.Module, config: dict[str, Any]) -> None:
        """Write a module's parameters to disk. Each process writes its part."""
        deepspeed.zero.Init(module=module, config_dict_or_path=config, param_swapper=self._swapper)

    def _peak_bytes(self, peak: PeakMemory) -> int | None:
        """The most memory above the idle process: when the model was loaded, or in the evaluation measured by ``peak``."""
        if peak.bytes is None or peak.start is None or self._loading.bytes is None or self._loading.start is None:
            return None
        return max(self._loading.bytes, peak.start - self._loading.start + peak.bytes)


@dataclass(frozen=True)
class WorkerResult:
    """One process's part of an evaluation. Memory is None if the machine cannot measure it."""

    indices: Tensor  # [m] int64: the examples that this process evaluated
    predictions: Predictions  # room for all n examples; only those at `indices` are filled in
    forward_seconds: float
    peak_bytes: int | None  # the most memory above the idle process
    process_bytes: int | None  # the most memory of the process as a whole


def worker_batches(examples: Examples, batch_size: int, rank: int, workers: int) -> list[tuple[np.ndarray, bool]]:
    """The batches of the process ``rank`` as indices of examples, each with True if its predictions count.

    All processes must run the same modules, so all get the same number of batches. A process that has too few runs the first
    batch again, which does not count.
    """
    batches = list(examples.by_length(batch_size))
    places = range(rank, -(-len(batches) // workers) * workers, workers)
    return [(batches[place], True) if place < len(batches) else (batches[0], False) for place in places]


class _Chain(nn.Module):
    """The layers, each followed by its adapter if the stack has one."""

    def __init__(self, blocks: Blocks, layers: nn.ModuleList) -> None:
        super().__init__()
        self._blocks, self.layers = blocks, layers

    def forward(self, batch: Batch, stack: AdapterStack) -> LayerStates:
        """Tokens [B, T] → the output of the last layer [B, T, D]."""
        return through_model(self._blocks, stack, enumerate(self.layers), batch)


def _deepspeed(ops: Path) -> Any:
    """Import DeepSpeed for a machine without GPUs, with the compiled libraries in ``ops``."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    import deepspeed
    from deepspeed.ops.op_builder.builder import OpBuilder

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed's own loader would look for a compiler, and wait for ever for the lock of a killed compilation.
    OpBuilder._loaded_ops |= {name: load_op(name, ops) for name in OPS}
    # Turn off an all-reduce through shared memory: nothing here needs it, and workers may be on different machines.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    return deepspeed


def _config(blocks: Blocks, nvme: Path, workers: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed requires a value, but nothing is trained
        "bf16": {"enabled": blocks.dtype == torch.bfloat16},
        "aio": {"block_size": SWAPPED_BYTES, "queue_depth": 8, "overlap_events": True},
        "zero_optimization": {
            "stage": 3,
            # Release each parameter right after its use, and read none ahead.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "memory_efficient_linear": False,  # it would replace torch's linear function in the whole process
            "offload_param": {
                "device": "nvme",
                "nvme_path": str(nvme),
                "pin_memory": False,
                "buffer_count": buffer_count(blocks),
                "buffer_size": buffer_elements(blocks, workers),
            },
        },
    }


def _swapper(config: dict[str, Any], blocks: Blocks) -> Any:
    """DeepSpeed's object that moves parameters to disk and back, changed to reserve disk space before each write.

    DeepSpeed does not check if a write succeeded. With a full disk, it would abort the process when it reads the file.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    class Swapper(AsyncPartitionedParameterSwapper):  # type: ignore[misc]
        def swap_out_and_release(self, params: list[Any], *options: Any, **more: Any) -> None:
            for param in params:
                _reserve(
                    Path(self.get_path(param)), self._io_aligned_numel(param.ds_tensor.ds_numel) * param.element_size()
                )
            super().swap_out_and_release(params, *options, **more)

    return Swapper(DeepSpeedConfig(config), blocks.dtype)


def _reserve(path: Path, size: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        words = f"the disk of {path.parent} has no room for {format_bytes(size)} more ({error.strerror})"
        raise OSError(error.errno, words) from None
    finally:
        os.close(file)
