"""Promises of a client's turn, in the process that takes it."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chainfed_ray.budget.footprint import SavedActivations
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Profiling, Training, Update
from chainfed_ray.client.objective import LossFunction
from chainfed_ray.client.progress import Progress, progress
from chainfed_ray.client.training import step_batches
from chainfed_ray.client.turn import take_turn
from chainfed_ray.data.tokens import of_like_length, ragged
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.pooling import LayerStates
from chainfed_ray.model.trunk import LayerCall
from tests.builders import a_job
from tests.watching import tensors_alive


def test_a_turn_leaves_no_tensor_behind(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    stack = AdapterStack.new(range(1, 4), job.hidden, bottleneck=8, classes=3, seed=0).tensors()
    training = Training(
        stack,
        Window(1, 2),
        2,
        epochs=1,
        batch_size=8,
        learning_rate=0.01,
        head_learning_rate=0.01,
        global_weight=0.1,
        global_trains="window",
        seed=0,
    )
    before = tensors_alive()  # held, so that no tensor of the turn gets the identity of one of these
    known = {id(tensor) for tensor in before}
    take_turn(job.clients[0], job.base, lambda: Profiling(8, seed=0), capped=False)
    update = take_turn(job.clients[0], job.base, lambda: training, capped=False)
    assert isinstance(update, Update)
    sent = {id(tensor) for tensor in update.tensors.values()}
    assert [tuple(tensor.shape) for tensor in tensors_alive() if id(tensor) not in known | sent] == []


@pytest.mark.parametrize(("steps", "expected"), [(None, 6), (2, 2), (7, 7)])
def test_a_turn_has_the_steps_it_is_ordered(
    steps: int | None, expected: int, document: dict[str, Any], tmp_path: Path
) -> None:
    document["rounds"] |= {"local_epochs": 2, "batch_size": 8, "local_steps": steps}
    job = a_job(document, tmp_path)
    client = replace(job.clients[0], examples=job.clients[0].examples.take(np.arange(20)))
    stack = AdapterStack.new(range(1, 4), job.hidden, bottleneck=8, classes=3, seed=0).tensors()
    order = Training(
        stack, Window(1, 2), 2, epochs=2, batch_size=8, learning_rate=0.01, head_learning_rate=0.01, global_weight=0.0,
        global_trains="window", seed=0, steps=steps,
    )  # fmt: skip
    update = take_turn(client, job.base, lambda: order, capped=False)
    assert isinstance(update, Update)
    assert update.steps == expected
    assert update.cpu_seconds > 0


def test_each_epoch_takes_every_example_once_in_an_order_of_its_own() -> None:
    order = Training({}, Window(0, 0), 0, 2, 8, 0.1, 0.1, 0.0, "head", seed=3)
    batches = list(step_batches(20, order))
    assert [len(batch) for batch in batches] == [8, 8, 4] * 2
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(first) != list(second)


def test_a_turn_says_how_far_it_is_while_it_runs(document: dict[str, Any], tmp_path: Path) -> None:
    """Asked in the middle of each step, as another thread may ask."""
    job = a_job(document, tmp_path)
    heard: list[Progress] = []

    def objective(stack: AdapterStack, window: Window, states: LayerStates, mask: Tensor, loss: LossFunction) -> Tensor:
        heard.append(progress())
        return loss(states, head_learns=True)

    stack = AdapterStack.new(range(1, 4), job.hidden, bottleneck=8, classes=3, seed=0).tensors()
    order = Training(
        stack, Window(2, 3), 3, epochs=1, batch_size=8, learning_rate=0.01, head_learning_rate=0.01, global_weight=0.0,
        global_trains="window", seed=0, steps=3, objective=objective,
    )  # fmt: skip
    client = replace(job.clients[0], plan=replace(job.clients[0].plan, window=order.window, micro_batch=8))
    take_turn(client, job.base, lambda: order, capped=False)
    told = [(each.doing.what, each.doing.done, each.doing.total, each.doing.unit) for each in heard]
    assert told == [("training", done, 3, "steps") for done in range(3)]
    assert sorted(each.worked for each in heard) == [each.worked for each in heard]


@pytest.mark.parametrize("activations", ["kept", "recomputed", "offloaded"])
@pytest.mark.parametrize("micro_batch", [16, 6])
def test_examples_of_like_length_run_together_and_the_update_is_the_same(
    activations: SavedActivations,
    micro_batch: int,
    document: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if each micro-batch was padded to its longest example, up to the order of sums, but layers see less padding."""
    job, generator = a_job(document, tmp_path), np.random.default_rng(0)
    lengths = generator.permutation([3] * 10 + [60] * 4 + [200] * 6)
    examples = ragged([generator.integers(5, 90, length) for length in lengths], generator.integers(0, 3, 20))
    plan = replace(job.clients[0].plan, window=Window(1, 3), micro_batch=micro_batch, activations=activations)
    stack = AdapterStack.new(range(1, 4), job.hidden, bottleneck=8, classes=3, seed=0).tensors()
    order = Training(
        stack, Window(1, 3), 3, epochs=1, batch_size=16, learning_rate=0.01, head_learning_rate=0.01, global_weight=0.0,
        global_trains="window", seed=0,
    )  # fmt: skip
    run, tokens = Blocks.run, Counter[str]()

    def counting(blocks: Blocks, layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
        tokens[how] += hidden.requires_grad * hidden.shape[0] * hidden.shape[1]
        return run(blocks, layer, hidden, call)

    monkeypatch.setattr(Blocks, "run", counting)
    found = {}
    for how, cut in (("in parts", of_like_length), ("whole", lambda lengths: [slice(0, len(lengths))])):
        monkeypatch.setattr("chainfed_ray.client.training.of_like_length", cut)
        client = replace(job.clients[0], examples=examples, plan=plan, name=how)
        update = take_turn(client, job.base, lambda: order, capped=False)
        assert isinstance(update, Update)
        found[how] = update
    assert found["in parts"].loss == pytest.approx(found["whole"].loss, rel=1e-5)
    for name, tensor in found["whole"].tensors.items():
        torch.testing.assert_close(found["in parts"].tensors[name], tensor, rtol=1e-3, atol=1e-5)
    assert tokens["in parts"] < (0.7 if micro_batch == 16 else 1) * tokens["whole"]
