"""Measures the seconds that one core takes for a training step, for a layer and for the head.

duration.py adds them up over a job. The layers of a model are alike, so one of them is timed for all. A batch that takes long
is timed in parts: on more and more of its tokens until a part takes long enough, then the rest is extrapolated.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from chainfed_ray.device.removal import temporary_folder
from chainfed_ray.device.threads import one_thread
from chainfed_ray.evaluation.predictions import predict
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.pooling import LayerStates
from chainfed_ray.model.prefix import PrefixRunner
from chainfed_ray.model.source import ModelSource

_ENOUGH_SECONDS = 0.4  # CPU time after which a measurement is long enough: clocks and other processes add little to it
_LONG_SECONDS = 2.0  # CPU time from which a first measurement is not repeated
_FEWEST_TOKENS = 2  # tokens of the first measurement: a single one would have no next token to predict
_MORE = 4  # the least factor by which the tokens grow from one measurement to the next
_MANY_MORE = 16  # about the largest one, where most of the time is what a step takes for any number of tokens
_DRAWN = 64  # batches drawn to find one of usual size


@dataclass(frozen=True)
class Pace:
    """The seconds of a client's work."""

    turn: float  # for each turn, whatever the number of examples
    step: float  # for each example in a training step
    layer: float  # for each example in a layer below the window
    load: float  # for reading a layer below the window, each time that examples pass through it


@dataclass(frozen=True)
class EvaluationPace:
    """The seconds of the server's work in an evaluation."""

    setup: float  # for each evaluation, whatever the number of rows: opening the base model
    row: float  # for each row in the head
    layer: float  # for each row in a layer
    load: float  # for reading a layer


class Taken(NamedTuple):
    """The time that some work took. On a busy machine ``seconds`` grow, but ``cpu_seconds`` do not."""

    seconds: float
    cpu_seconds: float


_Timed = Callable[[Examples], Taken]


def training_pace(base: ModelSource, client: Client, order: Training) -> Pace:
    """The pace of ``client`` in a turn with ``order``. The order's window is at the bottom of the model."""
    plan, examples = client.plan, client.examples
    with _opened(base) as (blocks, setup), matrix_reader(blocks, plan) as matrices:
        runner = PrefixRunner(blocks, plan.prefix.batch, matrices if plan.prefix.weights == "streamed" else None)
        stack = AdapterStack.from_tensors(order.tensors)
        layer, load = _layer_pace(runner, stack, examples)
        batch = usual_batch(examples, _random_batches(examples, order, plan.micro_batch))
        step = seconds_of(batch, lambda part: _time_step(blocks, replace(client, examples=part), order))
    # Each timed step also loaded the layers that it runs. A turn loads them once, so that time moves from the step to the turn.
    loading = (order.exit - stack.below(plan.window.bottom)) * load if plan.weights == "resident" else 0.0
    return Pace(setup + loading, max(step - loading, 0) / len(batch), layer, load)


def evaluation_pace(base: ModelSource, rows: Examples, stack: AdapterStack, window: int) -> EvaluationPace:
    """The pace of the server as it evaluates ``stack`` on ``rows``, at the top of a window of ``window`` layers."""
    with _opened(base) as (blocks, setup):
        matrices = blocks.reader()
        try:
            below, _ = evaluation_weights(blocks.layer_bytes, blocks.conversion_bytes, window)
            runner = PrefixRunner(blocks, matrices=matrices if below == "streamed" else None)
            layer, load = _layer_pace(runner, stack, rows)

            def head(part: Examples) -> Taken:
                batch, states = part.batch(np.arange(len(part))), _some_states(blocks, stack, part)
                return _time(lambda: predict(blocks, stack, states, batch, matrices))

            batch = usual_batch(rows, rows.by_length(PREFIX_BATCH))
            return EvaluationPace(setup, seconds_of(batch, head) / len(batch), layer, load)
        finally:
            matrices.close()


@contextmanager
def _opened(base: ModelSource) -> Iterator[tuple[Blocks, float]]:
    """Open the base model, and measure the seconds that this takes.

    Within this context the process has one thread and returns freed memory at once, as it does in turns and evaluations.
    """
    with PeakMemory(), one_thread():
        started = perf_counter()
        blocks = Blocks(base.folder, base.dtype)
        setup = perf_counter() - started
        try:
            yield blocks, setup
        finally:
            blocks.close()


def _layer_pace(runner: PrefixRunner, stack: AdapterStack, examples: Examples) -> tuple[float, float]:
    """The seconds for an example in a layer with the adapter below it, and the seconds for reading a layer."""
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
    """Layer states with the shapes that a layer's output has. Their values do not matter for timing."""
    batch = part.batch(np.arange(len(part)))
    hidden, _ = blocks.embed(batch.ids, batch.mask)
    pooled = hidden.new_zeros(len(hidden), min(1, stack.pooled_layers), hidden.shape[-1]).float()
    return LayerStates(hidden, pooled)


def _time_step(blocks: Blocks, client: Client, order: Training) -> Taken:
    """Time one optimizer step on all examples of ``client``, and loading its window. The prefix cache is made beforehand."""
    plan = replace(client.plan, micro_batch=len(client.examples), prefix=replace(client.plan.prefix, cached=True))
    client = replace(client, plan=plan)
    with temporary_folder("chainfed-") as folder:
        stack = AdapterStack.from_tensors(order.tensors)
        with matrix_reader(blocks, plan) as matrices:
            window_inputs(client, blocks, folder, stack, matrices, order.window)
        step = replace(order, batch_size=len(client.examples))
        return _time(lambda: train(client, blocks, folder, step))


def _random_batches(examples: Examples, order: Training, size: int) -> Iterator[np.ndarray]:
    """Random micro-batches of ``size`` examples, as a client that follows ``order`` draws them."""
    generator = np.random.default_rng(order.seed)
    for _ in range(_DRAWN):
        yield from examples.by_length(size, generator.permutation(len(examples))[: order.batch_size])


def usual_batch(examples: Examples, batches: Iterable[np.ndarray]) -> Examples:
    """The batch whose number of tokens, with padding, is nearest to the average over ``batches``."""
    found = list(batches)
    tokens = np.array([len(batch) * examples.lengths[batch].max() for batch in found])
    return examples.take(found[int(np.abs(tokens - tokens.mean()).argmin())])


def seconds_of(batch: Examples, timed: _Timed) -> float:
    """The seconds that the work ``timed`` takes for ``batch``, extrapolated if a part of the batch takes long enough."""
    whole = tokens_of(batch)
    tokens = min(_FEWEST_TOKENS, whole)
    part, taken = part_of(batch, tokens), timed(part_of(batch, tokens))
    if taken.cpu_seconds < _LONG_SECONDS:  # repeated, because the first call also loads code and tables
        taken = timed(part)
    fewer, before = 0, Taken(0.0, 0.0)
    while tokens_of(part) < whole and not _tells(taken, before, fewer):
        growth = _growth(taken, before, tokens_of(part), fewer)
        fewer, before = tokens_of(part), taken
        tokens = min(tokens * growth, whole)
        part = part_of(batch, tokens)
        taken = timed(part)
    slope = max(taken.seconds - before.seconds, 0) / (tokens_of(part) - fewer)
    return taken.seconds + (whole - tokens_of(part)) * slope


def _tells(taken: Taken, before: Taken, fewer: int) -> bool:
    """True if a measurement tells how long a token takes: it is long, and much longer than that ``before`` on ``fewer`` tokens.

    Otherwise most of it may be what a step takes for any number of tokens, such as reading the weights.
    """
    much_longer = fewer > 0 and taken.cpu_seconds >= max(_ENOUGH_SECONDS, 2 * before.cpu_seconds)
    return much_longer or taken.cpu_seconds >= _LONG_SECONDS


def _growth(taken: Taken, before: Taken, tokens: int, fewer: int) -> int:
    """The factor by which the tokens of the next measurement are more, so that it tells and takes no longer than it must.

    It tells if it takes twice as long as the one on ``tokens`` tokens, which the time of the further tokens foretells.
    """
    if taken.cpu_seconds <= _ENOUGH_SECONDS:
        return _MORE
    of_further = max(taken.cpu_seconds - before.cpu_seconds, 0) / (tokens - fewer) * tokens
    if not fewer or _MANY_MORE * of_further < taken.cpu_seconds:
        return _MANY_MORE
    return max(_MORE, math.ceil(1 + taken.cpu_seconds / of_further))


def part_of(batch: Examples, tokens: int) -> Examples:
    """A part of a batch with about ``tokens`` tokens: some of its longest examples.

    If the longest example alone has more tokens, the part is this example with ``tokens`` of its tokens, evenly spaced.
    """
    longest = int(batch.lengths.max())
    if tokens >= longest:
        return batch.take(np.argsort(-batch.lengths, kind="stable")[: tokens // longest])
    example = batch.take(np.array([int(batch.lengths.argmax())]))
    places = np.linspace(0, longest - 1, tokens).astype(np.int64)
    targets = None if example.targets is None else [example.targets[places]]
    return ragged([example.ids[places]], example.labels, targets)


def tokens_of(batch: Examples) -> int:
    """The number of tokens in a batch, with padding."""
    return len(batch) * int(batch.lengths.max())


def _time(work: Callable[[], object]) -> Taken:
    started, cpu_started = perf_counter(), process_time()
    work()
    return Taken(perf_counter() - started, process_time() - cpu_started)
