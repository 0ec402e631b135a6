"""Promise: a turn of a language model's chain is the plain computation: the whole model, adapters by hooks, AdamW."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from chainfed_ray.budget.footprint import Footprint, SavedActivations, WeightPlacement
from chainfed_ray.budget.planner import Prefix, TurnPlan
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client, Training
from chainfed_ray.client.training import train
from chainfed_ray.data.tokens import Examples, ragged
from chainfed_ray.model.adapters import AdapterStack, Tensors
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.streaming.matrices import SLICE_BYTES
from tests.models import tiny_causal_model

LAYERS, START, EPOCHS, RATE = 5, 1, 3, 1e-3
BOTTOM, MIDDLE, TOP = Window(1, 2), Window(2, 3), Window(3, 4)


@pytest.fixture(scope="module", params=["llama", "gemma2", "phi"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain head; one that is tied, capped, and above windows of 4 tokens; one with a bias."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_causal_model(request.param, tied=request.param == "gemma2", layers=LAYERS).save_pretrained(folder)
    return folder


def instructions() -> Examples:
    """Five examples of unequal length, of which the last tokens are to be predicted; of one of them none."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 128, length).astype(np.int32) for length in (9, 4, 7, 5, 9)]
    targets = [np.arange(len(row)) >= len(row) - count for row, count in zip(rows, (3, 2, 6, 0, 8), strict=True)]
    return ragged(rows, np.zeros(5, dtype=np.int64), targets)


def a_stack() -> AdapterStack:
    """Adapters that are far from the identity."""
    stack = AdapterStack.new(range(START, LAYERS), 32, 4, None, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return stack


def an_order(window: Window, weight: float, trains: Any = "head", exact: bool = False) -> Training:
    return Training(
        a_stack().tensors(),
        window,
        LAYERS - 1 if exact else window.top,
        epochs=EPOCHS,
        batch_size=5,
        learning_rate=RATE,
        head_learning_rate=RATE,
        global_weight=weight,
        global_trains=trains,
        seed=0,
    )


def a_client(
    window: Window, weights: WeightPlacement = "resident", activations: SavedActivations = "kept", cached: bool = True
) -> Client:
    """It takes two examples at a time."""
    buffers = Footprint(0, 2 * SLICE_BYTES, 0, 0, 0, 0, 0, 0, 0, 0)
    prefix = Prefix(2, weights, cached, planned_bytes=0, profile_bytes=0)
    return Client("client", "any", instructions(), 0, TurnPlan(window, 2, weights, activations, prefix, buffers, 0), 0)


def a_turn(folder: Path, scratch: Path, client: Client, order: Training) -> tuple[Tensors, float]:
    blocks = Blocks(folder, torch.float32)
    try:
        update = train(client, blocks, scratch, order)
    finally:
        blocks.close()
    return update.tensors, update.loss


def plainly(
    folder: Path,
    window: Window,
    weight: float,
    trains: str = "head",
    clip_norm: float | None = None,
    exact: bool = False,
) -> tuple[Tensors, float]:
    """What is trained, and the mean loss of an example; nothing is streamed, cached or added up in parts."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    blocks = Blocks(folder, torch.float32)
    layers: Any = model.base_model.get_submodule(blocks.layers_path)
    blocks.close()
    stack, examples = a_stack().requires_grad_(False), instructions()
    batch = examples.batch(np.arange(5))
    assert batch.targets is not None
    above = range(window.top + 1, LAYERS)
    trained = [*window, *(above if trains == "upper" and weight else ())]
    names = [name for name in stack.state_dict() if int(name.split(".")[1]) in trained]
    parameters = dict(stack.named_parameters())
    optimizer = torch.optim.AdamW([parameters[name].requires_grad_() for name in names], RATE, weight_decay=0.0)

    def loss_of(stand_ins: bool) -> Tensor:
        """Above the window there are no layers: with ``stand_ins`` their adapters, otherwise nothing; or all, if ``exact``."""

        def after(index: int) -> Any:
            def hook(_: Any, inputs: tuple[Tensor], given: dict[str, Any], output: Any) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                if index > window.top and not exact:
                    hidden = inputs[0] if inputs else given["hidden_states"]
                if START <= index <= window.top or (index > window.top and (stand_ins or exact)):
                    hidden = stack.adapter(index)(hidden)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return hook

        hooks = [layer.register_forward_hook(after(index), with_kwargs=True) for index, layer in enumerate(layers)]
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        total = torch.zeros(())
        for row in range(5):
            places = batch.targets[row].nonzero().squeeze(1)
            if len(places):
                total = total + cross_entropy(logits[row, places - 1], batch.ids[row, places])
        return total / 5

    losses = []
    for _ in range(EPOCHS):
        loss = loss_of(stand_ins=False)
        if above and weight:
            loss = loss + weight * loss_of(stand_ins=True)
        loss.backward()
        if clip_norm is not None:
            gradients = [parameters[name].grad for name in names]
            length = torch.cat([gradient.reshape(-1) for gradient in gradients if gradient is not None]).norm()
            for gradient in gradients:
                assert gradient is not None
                gradient.mul_((clip_norm / (length + 1e-6)).clamp(max=1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {name: parameters[name].detach() for name in names}, sum(losses) / EPOCHS


def assert_alike(found: tuple[Tensors, float], expected: tuple[Tensors, float]) -> None:
    """To a thousandth of a step of AdamW, and of what was there before a long way off."""
    before = a_stack().state_dict()
    assert found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=0, atol=RATE / 1000)
        assert (tensor - before[name]).abs().max() > RATE
    assert found[1] == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("window", [BOTTOM, MIDDLE, TOP], ids=["bottom", "middle", "top"])
def test_a_turn_is_the_plain_computation(folder: Path, window: Window, weight: float, tmp_path: Path) -> None:
    found = a_turn(folder, tmp_path, a_client(window), an_order(window, weight))
    assert_alike(found, plainly(folder, window, weight))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "activations", "cached"),
    [
        ("streamed", "kept", True),
        ("streamed", "recomputed", True),
        ("streamed", "offloaded", True),
        ("resident", "kept", False),
    ],
)
def test_so_is_one_in_any_other_way(
    weights: WeightPlacement, activations: SavedActivations, cached: bool, folder: Path, tmp_path: Path
) -> None:
    client = a_client(MIDDLE, weights, activations, cached)
    assert_alike(a_turn(folder, tmp_path, client, an_order(MIDDLE, 0.3)), plainly(folder, MIDDLE, 0.3))


@pytest.mark.slow
@pytest.mark.parametrize("window", [Window(1, 1), Window(1, 4)], ids=str)
def test_an_exact_look_ahead_has_the_gradient_of_the_whole_model(folder: Path, window: Window, tmp_path: Path) -> None:
    """Whether weights are resident or streamed, and whatever becomes of saved activations. Two of these ways change no bit."""
    expected = plainly(folder, window, 0.0, exact=True)
    ways = product(get_args(WeightPlacement), get_args(SavedActivations))
    found = {
        way: a_turn(folder, tmp_path / "-".join(way), a_client(window, *way), an_order(window, 0.0, exact=True))
        for way in ways
    }
    for turn in found.values():
        assert_alike(turn, expected)
    plain, loss = found["resident", "kept"]
    for way in (("streamed", "kept"), ("resident", "recomputed"), ("streamed", "recomputed")):
        assert found[way][1] == loss
        assert all(torch.equal(tensor, plain[name]) for name, tensor in found[way][0].items())


@pytest.mark.slow
def test_the_layers_above_are_part_of_what_is_compared(folder: Path) -> None:
    ahead, local = (plainly(folder, BOTTOM, 0.0, exact=exact) for exact in (True, False))
    name = "adapters.1.down.weight"
    assert (ahead[0][name] - local[0][name]).abs().max() > RATE / 10


@pytest.mark.slow
def test_the_global_branch_may_train_the_adapters_above(folder: Path, tmp_path: Path) -> None:
    found = a_turn(folder, tmp_path, a_client(BOTTOM), an_order(BOTTOM, 0.3, "upper"))
    assert_alike(found, plainly(folder, BOTTOM, 0.3, "upper"))
    assert {name.split(".")[1] for name in found[0]} == {"1", "2", "3", "4"}


@pytest.mark.slow
def test_the_global_branch_is_part_of_what_is_compared(folder: Path) -> None:
    with_it, without = plainly(folder, BOTTOM, 0.3), plainly(folder, BOTTOM, 0.0)
    assert with_it[1] > without[1] + 0.1
    name = "adapters.1.down.weight"
    assert (with_it[0][name] - without[0][name]).abs().max() > RATE / 10


@pytest.mark.slow
def test_the_gradient_of_a_whole_step_is_clipped(folder: Path, tmp_path: Path) -> None:
    """Of five examples that are held two at a time. A factor matters little to AdamW, unless it makes all as short as its ε."""
    order = replace(an_order(MIDDLE, 0.3), clip_norm=1e-8)
    found, _ = a_turn(folder, tmp_path, a_client(MIDDLE), order)
    expected, _ = plainly(folder, MIDDLE, 0.3, clip_norm=1e-8)
    unclipped, _ = plainly(folder, MIDDLE, 0.3)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=RATE / 1000)
    name = "adapters.2.down.weight"
    assert (unclipped[name] - expected[name]).abs().max() > RATE
