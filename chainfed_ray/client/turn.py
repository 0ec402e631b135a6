"""Runs a client's turn in this process: measures its memory, holds it to the client's budget, and frees it afterwards."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from chainfed_ray.budget.footprint import Footprint
from chainfed_ray.budget.planner import Prefix, TurnPlan
from chainfed_ray.chain import Window
from chainfed_ray.client.head_sums import sum_features
from chainfed_ray.client.messages import (
    Calibrating,
    Client,
    Evaluating,
    Fitting,
    Profiling,
    Training,
    TurnOrder,
    TurnResult,
)
from chainfed_ray.client.profiling import profile
from chainfed_ray.client.progress import simulate
from chainfed_ray.client.training import train
from chainfed_ray.data.tokens import Examples
from chainfed_ray.device.cap import MemoryCap
from chainfed_ray.device.lean_imports import load_models
from chainfed_ray.device.peak import PeakMemory
from chainfed_ray.device.removal import temporary_folder
from chainfed_ray.device.threads import one_thread
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.source import ModelSource
from chainfed_ray.streaming.matrices import SLICE_BYTES


def take_turn(client: Client, base: ModelSource, fetch: Callable[[], TurnOrder], capped: bool) -> TurnResult:
    """Carry out the order that ``fetch`` gives, and measure the peak of memory.

    ``fetch`` is called within the measured turn, because the memory of the order itself counts too.

    Raises:
        BudgetExceeded: the turn is ``capped`` and would have taken more than ``client.cap_bytes``.
    """
    examples = client.examples
    for data in (examples.ids, examples.offsets, examples.labels, examples.targets):
        if data is not None:
            data.sum()  # reads the data's pages into memory before the turn is measured: a budget is for training alone
    peak = MemoryCap(client.plan.planned_bytes, client.cap_bytes) if capped else PeakMemory()
    with peak, one_thread():
        result = _carry_out(client, base, fetch())
    return replace(result, peak_bytes=peak.bytes)


@contextmanager
def slowed(speed: float) -> Iterator[None]:
    """Simulate a machine of ``speed``, at most 1: after the block, sleep until it has taken 1/speed times its own time.

    A block that fails is slowed down as well.
    """
    started = perf_counter()
    try:
        yield
    finally:
        if speed < 1:
            simulate((perf_counter() - started) * (1 / speed - 1))


def _carry_out(client: Client, base: ModelSource, order: TurnOrder) -> TurnResult:
    blocks = Blocks(base.folder, base.dtype)
    try:
        if isinstance(order, Profiling):
            return profile(client, blocks, base.scratch / client.name, order)
        if isinstance(order, Fitting):
            return sum_features(client, blocks, base.scratch / client.name, order)
        if isinstance(order, Evaluating | Calibrating):
            raise TypeError("a simulated client holds out no rows: the server evaluates on its own")
        return train(client, blocks, base.scratch / client.name, order)
    finally:
        blocks.close()


def ready(base: ModelSource) -> None:
    """Load the libraries that turns need, and no others.

    What they allocate on first use then counts as the idle process, not as a client's memory.
    """
    load_models()
    warm_up(base)


def warm_up(base: ModelSource) -> None:
    """Take a turn on a few tokens, so that libraries load their code and fill their buffers before any client's turn.

    That memory belongs to the process, and must not count against the first client's budget. The turn streams weights and
    offloads activations, so warming up itself needs little memory: some 30 MiB for the libraries' buffers.
    """
    with PeakMemory(), one_thread(), temporary_folder("chainfed-") as folder:
        _train_on_a_few_tokens(base, folder)
        _fill_library_buffers(base.dtype)
    # Objects that exist now stay for the life of the process. Frozen, they need not be looked at by the collection before each
    # turn, which would take a fifth of a second.
    gc.collect()
    gc.freeze()


def _train_on_a_few_tokens(base: ModelSource, scratch: Path) -> None:
    examples = Examples(np.ones(16, dtype=np.int32), np.array([0, 6, 16]), np.zeros(2, dtype=np.int64))
    blocks = Blocks(base.folder, base.dtype)
    try:
        window = Window(0, min(1, blocks.num_layers - 1))
        footprint = Footprint(0, 2 * SLICE_BYTES, 0, 0, 0, 0, 0, 0, 0, 0)
        prefix = Prefix(2, "streamed", cached=True, planned_bytes=0, profile_bytes=0)
        client = Client(
            "(all)", "(all)", examples, 0, TurnPlan(window, 1, "streamed", "offloaded", prefix, footprint, 0), 0
        )
        order = Training(
            AdapterStack.new(window, blocks.hidden_size, 1, 2, seed=0).tensors(),
            window,
            window.top,
            epochs=1,
            batch_size=2,
            learning_rate=0,
            head_learning_rate=0,
            global_weight=0,
            global_trains="window",
            seed=0,
        )
        train(client, blocks, scratch, order)
    finally:
        blocks.close()


def _fill_library_buffers(dtype: torch.dtype) -> None:
    """Multiply matrices that fill the packing buffers, which the libraries of linear algebra keep once they have them.

    Larger matrices need no larger buffers.
    """
    few, many = torch.ones(512, 1024, dtype=dtype), torch.ones(4096, 1024, dtype=dtype)
    (few @ many.T) @ many
