"""Seconds of one core, measured: of a training step, of a layer, of the head. Their sums over a job are duration.py.

Layers of a model are alike, so one of them is timed and stands for all. A batch that takes long is timed in part: on more and
more of its tokens, until that takes a good while. The rest is in proportion.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import NamedTuple

import numpy as np

from chainfed_ray.budget.planner import PREFIX_BATCH
from chainfed_ray.budget.server import evaluation_weights
from chainfed_ray.client.entrance import matrix_reader, window_inputs
from chainfed_ray.client.messages import Client, Training
from chainfed_ray.client.training import train
from chainfed_ray.data.tokens import Examples, ragged
from chainfed_ray.device.peak import PeakMemory
from chainfed_ray.device.threads import one_thread
from chainfed_ray.evaluation.predictions import predict
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.pooling import LayerStates
from chainfed_ray.model.prefix import PrefixRunner
from chainfed_ray.model.source import ModelSource

_ENOUGH_SECONDS = 0.4  # of CPU, of one measurement: what a clock and other processes add is small beside it
_LONG_SECONDS = 2.0  # of a first measurement, which is not repeated then
_FEWEST_TOKENS = 2  # of the first measurement: one token has none to predict
_MORE = 4  # times as many tokens in the next
_DRAWN = 64  # batches in search of a usual one


@dataclass(frozen=True)
class Pace:
    """A client's."""

    turn: float  # of a turn, however many examples it has
    step: float  # of an example in a training step
    layer: float  # of an example in a layer below the window
    load: float  # of reading a layer below the window, each time that examples pass through it


@dataclass(frozen=True)
class EvaluationPace:
    """The server's, as it judges a stack."""

    job_started: float  # of an evaluation, however many rows it has
    row: float  # of a row in the head
    layer: float  # of a row in a layer
    load: float  # of reading a layer


class Taken(NamedTuple):
    """What some work took. A machine that is busy with other things takes longer, and no more CPU."""

    seconds: float
    cpu_seconds: float


_Timed = Callable[[Examples], Taken]


def training_pace(base: ModelSource, client: Client, order: Training) -> Pace:
    """The pace of a client in the turn of ``order``, whose window is at the bottom of the model."""
    plan, examples = client.plan, client.examples
    with _opened(base) as (blocks, job_started), matrix_reader(blocks, plan) as matrices:
        runner = PrefixRunner(blocks, plan.prefix.batch, matrices if plan.prefix.weights == "streamed" else None)
        layer, load = _layer_pace(runner, AdapterStack.from_tensors(order.tensors), examples)
        batch = usual_batch(examples, _random_batches(len(examples), plan.micro_batch, order.seed))
        step = seconds_of(batch, lambda part: _time_step(blocks, replace(client, examples=part), order))
    # A step was timed together with reading the window.
    window = (len(plan.window) - 1) * load if plan.weights == "resident" else 0.0
    return Pace(job_started + window, max(step - window, 0) / len(batch), layer, load)


def evaluation_pace(base: ModelSource, rows: Examples, stack: AdapterStack, window: int) -> EvaluationPace:
    """The pace of the server as it judges ``stack`` on ``rows``, at the top of a window of so many layers."""
    with _opened(base) as (blocks, job_started):
        matrices = blocks.reader()
        try:
            below, _ = evaluation_weights(blocks.layer_bytes, blocks.conversion_bytes, window)
            runner = PrefixRunner(blocks, matrices=matrices if below == "streamed" else None)
            layer, load = _layer_pace(runner, stack, rows)

            def head(part: Examples) -> Taken:
                batch, states = part.batch(np.arange(len(part))), _some_states(blocks, stack, part)
                return _time(lambda: predict(blocks, stack, states, batch, matrices))

            batch = usual_batch(rows, rows.by_length(PREFIX_BATCH))
            return EvaluationPace(job_started, seconds_of(batch, head) / len(batch), layer, load)
        finally:
            matrices.close()


@contextmanager
def _opened(base: ModelSource) -> Iterator[tuple[Blocks, float]]:
    """The base model, and the seconds of opening it; this process then has one thread, and gives freed memory back at once.

    So has one that takes turns, or judges.
    """
    with PeakMemory(), one_thread():
        started = perf_counter()
        blocks = Blocks(base.folder, base.dtype)
        job_started = perf_counter() - started
        try:
            yield blocks, job_started
        finally:
            blocks.close()


def _layer_pace(runner: PrefixRunner, stack: AdapterStack, examples: Examples) -> tuple[float, float]:
    """Of an example in a layer, with the adapter below it; and of reading a layer."""
    blocks = runner.blocks
    index = min(1, blocks.num_layers - 1)
    started = perf_counter()
    layer = blocks.load_layer(index, runner.matrices)
    load = perf_counter() - started

    def through(part: Examples) -> Taken:
        every, below = np.arange(len(part)), _some_states(blocks, stack, part) if index else None
        return _time(lambda: runner.run(index, layer, stack, part, every, below))

    batch = usual_batch(examples, examples.by_length(runner.batch))
    return seconds_of(batch, through) / len(batch), load


def _some_states(blocks: Blocks, stack: AdapterStack, part: Examples) -> LayerStates:
    """States of the right form, as if a layer had given them."""
    batch = part.batch(np.arange(len(part)))
    hidden, _ = blocks.embed(batch.ids, batch.mask)
    pooled = hidden.new_zeros(len(hidden), min(1, stack.pooled_layers), hidden.shape[-1]).float()
    return LayerStates(hidden, pooled)


def _time_step(blocks: Blocks, client: Client, order: Training) -> Taken:
    """One optimizer step on all examples of ``client``, with reading its window; what enters that is made before."""
    plan = replace(client.plan, micro_batch=len(client.examples), prefix=replace(client.plan.prefix, cached=True))
    client = replace(client, plan=plan)
    with tempfile.TemporaryDirectory(prefix="chainfed-") as folder:
        stack = AdapterStack.from_tensors(order.tensors)
        with matrix_reader(blocks, plan) as matrices:
            window_inputs(client, blocks, Path(folder), stack, matrices, order.window)
        step = replace(order, batch_size=len(client.examples))
        return _time(lambda: train(client, blocks, Path(folder), step))


def _random_batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Micro-batches as a client draws them."""
    generator = np.random.default_rng(seed)
    return (generator.permutation(count)[:size] for _ in range(_DRAWN))


def usual_batch(examples: Examples, batches: Iterable[np.ndarray]) -> Examples:
    """The batch that has nearest to as many tokens, with padding, as ``batches`` have on average."""
    found = list(batches)
    tokens = np.array([len(batch) * examples.lengths[batch].max() for batch in found])
    return examples.take(found[int(np.abs(tokens - tokens.mean()).argmin())])


def seconds_of(batch: Examples, timed: _Timed) -> float:
    """Seconds of the work that is ``timed``, for ``batch``: of larger and larger parts of it, and then in proportion."""
    whole = tokens_of(batch)
    tokens = min(_FEWEST_TOKENS, whole)
    shorter, part, taken = (0, 0.0), part_of(batch, tokens), timed(part_of(batch, tokens))
    if taken.cpu_seconds < _LONG_SECONDS:  # what is loaded the first time is no part of it
        taken = timed(part)
    while tokens_of(part) < whole and taken.cpu_seconds < _ENOUGH_SECONDS:
        shorter = tokens_of(part), taken.seconds
        tokens = min(tokens * _MORE, whole)
        part = part_of(batch, tokens)
        taken = timed(part)
    slope = max(taken.seconds - shorter[1], 0) / (tokens_of(part) - shorter[0])
    return taken.seconds + (whole - tokens_of(part)) * slope


def part_of(batch: Examples, tokens: int) -> Examples:
    """As many of the longest examples of a batch as have so many tokens; or of one so many, from its beginning to its end."""
    longest = int(batch.lengths.max())
    if tokens >= longest:
        return batch.take(np.argsort(-batch.lengths, kind="stable")[: tokens // longest])
    example = batch.take(np.array([int(batch.lengths.argmax())]))
    places = np.linspace(0, longest - 1, tokens).astype(np.int64)
    targets = None if example.targets is None else [example.targets[places]]
    return ragged([example.ids[places]], example.labels, targets)


def tokens_of(batch: Examples) -> int:
    """How many there are in a batch, with padding."""
    return len(batch) * int(batch.lengths.max())


def _time(work: Callable[[], object]) -> Taken:
    started, cpu_started = perf_counter(), process_time()
    work()
    return Taken(perf_counter() - started, process_time() - cpu_started)
