"""What a process of an offloaded evaluation does from its first order to the last (run.py).

Its files are removed when it ends, in any way.
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
from chainfed_ray.evaluation.evaluator import EvaluationSets
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.source import ModelSource

_POLL_SECONDS = 5.0
_ANSWER_SECONDS = 60.0  # of an actor that only notes things down
_MADV_DONTNEED = 4  # of Linux: the bytes of a shared mapping stay where they are, and are this process's no more
# How messages of torch's begin: with a place in its source, or the file and the line.
_SOURCE = re.compile(r"^\[[^\]]*:\d+\]\s*")
_CONNECTION = re.compile(r"gloo|connection (was )?(closed|reset|refused)|broken pipe|timed out waiting", re.IGNORECASE)


@dataclass(frozen=True)
class Work:
    """What every worker of an evaluator is told."""

    base: ModelSource
    sets: EvaluationSets
    batch_size: int


def serve(run: RunSpec, actor: Any) -> None:
    """Judge what the run's actor has to be judged, until it says that it is over."""
    from ray import train

    context: Any = train.get_context()
    rank, beside = context.get_world_rank(), context.get_local_world_size()
    os.environ |= {"LOCAL_RANK": str(context.get_local_rank()), "LOCAL_SIZE": str(beside)}
    try:
        ray.get(actor.join.remote(rank, ray.get_runtime_context().current_actor), timeout=_ANSWER_SECONDS)
        torch.set_num_threads(1)
        if run.workers > 1:
            _meet(run, actor, rank)
        work: Work = ray.get(run.work[0], timeout=_ANSWER_SECONDS)
        folder = work.base.scratch / OFFLOAD
        _clear(folder, keep=run.name)
        _check(work.base, folder, run.workers, beside)
        if run.workers > 1:
            torch.distributed.barrier()  # nobody writes before everybody has looked at what is free
        _judge(run, work, actor, rank, folder)
    except Exception as error:
        traceback.print_exc()
        with suppress(Exception):
            ray.get(actor.failed.remote(why(error)), timeout=_ANSWER_SECONDS)
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def why(error: Exception) -> Reason:
    """Why a worker ends with ``error``, in a line."""
    words = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
    of_torch = isinstance(error, RuntimeError) and _CONNECTION.search(words) is not None
    return Reason(_SOURCE.sub("", words).splitlines()[0], of_torch or isinstance(error, torch.distributed.DistError))


def _meet(run: RunSpec, actor: Any, rank: int) -> None:
    """Join the other workers in torch's default group: the one of rank 0 is found through the actor."""
    if rank == 0:
        here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        store = TCPStore(here, 0, run.workers, is_master=True, wait_for_workers=False)
        ray.get(actor.meet.remote(store.host, store.port), timeout=_ANSWER_SECONDS)
    else:
        found: tuple[str, int] | None = ray.get(actor.meeting.remote(START_SECONDS), timeout=2 * START_SECONDS)
        if found is None:
            raise RuntimeError(f"the first of the workers was not found within {START_SECONDS:g} s")
        store = TCPStore(*found, run.workers, is_master=False)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=run.workers)


def _judge(run: RunSpec, work: Work, actor: Any, rank: int, folder: Path) -> None:
    """Load the model, and carry out orders as they come."""
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
            with _received(order.stack[0]) as stack:
                share = model.evaluate(stack, work.sets[order.examples], work.batch_size)
            del stack, order
            ray.get(actor.answer.remote(rank, number, pickle.dumps(share)), timeout=_ANSWER_SECONDS)
    finally:
        model.close()
        with suppress(OSError):  # of the worker that is last
            (folder / run.name).rmdir()
            folder.rmdir()


def _clear(folder: Path, keep: str) -> None:
    """Remove what other runs left behind; there is one run of a job at a time."""
    for path in folder.glob("*"):
        if path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


def _check(base: ModelSource, folder: Path, workers: int, beside: int) -> None:
    """This may be another machine than the owner's. Its disk is for ``beside`` of the workers, this one among them."""
    blocks = Blocks(base.folder, base.dtype)
    try:
        reason = why_not(look(folder), swap_bytes(blocks, workers), -(-disk_bytes(blocks) * beside // workers))
    finally:
        blocks.close()
    if reason:
        raise RuntimeError(reason)


def sent(stack: AdapterStack) -> list[Any]:
    """A stack as an order has it: as arrays, which Ray hands on without a copy."""
    return [ray.put({name: tensor.numpy() for name, tensor in stack.tensors().items()})]


@contextmanager
def _received(reference: Any) -> Iterator[AdapterStack]:
    """The stack of an order, read where it lies. Its pages would count as this process's for as long as that lives: they are
    let go of after use.
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
