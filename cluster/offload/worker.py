"""A worker of an evaluation with the weights on disk: it loads the model, and carries out orders until the run ends (run.py).

The worker's files are removed when it ends, even if it is killed.
"""

import ctypes
import os
import pickle
import re
import shutil
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from chainfed_ray.cluster.offload.build import ops_folder
from chainfed_ray.cluster.offload.doctor import look, why_not
from chainfed_ray.cluster.offload.footprint import disk_bytes, swap_bytes
from chainfed_ray.cluster.offload.messages import OFFLOAD, START_SECONDS, EvaluationOrder, Reason, RunSpec
from chainfed_ray.cluster.offload.model import OffloadedModel
from chainfed_ray.device.lean_imports import load_models
from chainfed_ray.evaluation.evaluator import EvaluationSets
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.source import ModelSource

_POLL_SECONDS = 5.0
_ANSWER_SECONDS = 60.0  # the longest that the run's actor may take to answer; it computes nothing
_MADV_DONTNEED = 4  # Linux: unmap pages of a shared mapping, so that they no longer count as this process's memory
# The file and line in torch's source with which its messages begin.
_SOURCE = re.compile(r"^\[[^\]]*:\d+\]\s*")
_CONNECTION = re.compile(r"gloo|connection (was )?(closed|reset|refused)|broken pipe|timed out waiting", re.IGNORECASE)


@dataclass(frozen=True)
class Work:
    """What every worker needs to know: the model, the held-out examples by name, and the batch size."""

    base: ModelSource
    sets: EvaluationSets
    batch_size: int


def serve(run: RunSpec, actor: Any) -> None:
    """Carry out the orders of the run's ``actor`` until the run ends. Any error is reported to the actor, then raised."""
    from ray import train

    context: Any = train.get_context()
    rank, local_workers = context.get_world_rank(), context.get_local_world_size()
    os.environ |= {"LOCAL_RANK": str(context.get_local_rank()), "LOCAL_SIZE": str(local_workers)}
    try:
        ray.get(actor.join.remote(rank, ray.get_runtime_context().current_actor), timeout=_ANSWER_SECONDS)
        torch.set_num_threads(1)
        load_models()
        if run.workers > 1:
            _meet(run, actor, rank)
        work: Work = ray.get(run.work[0], timeout=_ANSWER_SECONDS)
        folder = work.base.scratch / OFFLOAD
        _clear(folder, keep=run.name)
        _check(work.base, folder, run.workers, local_workers)
        if run.workers > 1:
            torch.distributed.barrier()  # no worker may write before every worker has checked the free disk
        _evaluate_orders(run, work, actor, rank, folder)
    except Exception as error:
        traceback.print_exc()
        with suppress(Exception):
            ray.get(actor.failed.remote(why(error)), timeout=_ANSWER_SECONDS)
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def why(error: Exception) -> Reason:
    """Describe in one line why a worker ends with ``error``, and tell if only its connection to another worker broke."""
    words = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
    broken = isinstance(error, RuntimeError) and _CONNECTION.search(words) is not None
    return Reason(_SOURCE.sub("", words).splitlines()[0], broken or isinstance(error, torch.distributed.DistError))


def _meet(run: RunSpec, actor: Any, rank: int) -> None:
    """Join torch's default process group with the other workers. They learn the address of rank 0 from the run's actor."""
    if rank == 0:
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        store = TCPStore(host, 0, run.workers, is_master=True, wait_for_workers=False)
        ray.get(actor.meet.remote(store.host, store.port), timeout=_ANSWER_SECONDS)
    else:
        found: tuple[str, int] | None = ray.get(actor.meeting.remote(START_SECONDS), timeout=2 * START_SECONDS)
        if found is None:
            raise RuntimeError(f"the worker of rank 0 gave no address within {START_SECONDS:g} s")
        store = TCPStore(*found, run.workers, is_master=False)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=run.workers)


def _evaluate_orders(run: RunSpec, work: Work, actor: Any, rank: int, folder: Path) -> None:
    """Load the model, and evaluate stacks as orders come."""
    model = OffloadedModel(work.base, folder / run.name / f"rank{rank}", ops_folder(), lambda: actor.alive.remote())
    try:
        number = 0
        while True:
            order: EvaluationOrder | None = ray.get(actor.next.remote(number, _POLL_SECONDS), timeout=_ANSWER_SECONDS)
            if order is None:
                continue
            if order.stack is None:
                return
            number = order.number
            with _mapped_stack(order.stack[0]) as stack:
                result = model.evaluate(stack, work.sets[order.examples], work.batch_size)
            del stack, order
            ray.get(actor.answer.remote(rank, number, pickle.dumps(result)), timeout=_ANSWER_SECONDS)
    finally:
        model.close()
        with suppress(OSError):  # the folder is not empty until the last worker has ended
            (folder / run.name).rmdir()
            folder.rmdir()


def _clear(folder: Path, keep: str) -> None:
    """Remove what earlier runs left behind. A job has one run at a time, so none of them is in use."""
    for path in folder.glob("*"):
        if path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


def _check(base: ModelSource, folder: Path, workers: int, local_workers: int) -> None:
    """Check this machine, which may be another one than the owner's. ``local_workers`` of the workers share its disk.

    Raises:
        RuntimeError: DeepSpeed cannot run here; the message says why.
    """
    blocks = Blocks(base.folder, base.dtype)
    try:
        reason = why_not(look(folder), swap_bytes(blocks, workers), -(-disk_bytes(blocks) * local_workers // workers))
    finally:
        blocks.close()
    if reason:
        raise RuntimeError(reason)


def put_stack(stack: AdapterStack) -> list[Any]:
    """Put a stack into Ray's shared memory, for an order. Its tensors travel as arrays, which Ray does not copy."""
    return [ray.put({name: tensor.numpy() for name, tensor in stack.tensors().items()})]


@contextmanager
def _mapped_stack(reference: Any) -> Iterator[AdapterStack]:
    """Map the stack of an order from shared memory, without a copy.

    Once read, its pages would count as this process's memory until it ends, so they are unmapped when the block ends.
    """
    arrays: dict[str, np.ndarray] = ray.get(reference, timeout=_ANSWER_SECONDS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    yield AdapterStack.from_tensors(tensors)
    libc = ctypes.CDLL(None)
    for array in arrays.values():
        first, end = -(-array.ctypes.data // PAGESIZE) * PAGESIZE, array.ctypes.data + array.nbytes
        if end - first >= PAGESIZE:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t((end - first) // PAGESIZE * PAGESIZE), _MADV_DONTNEED)
