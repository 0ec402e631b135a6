"""Promise: a turn of a language model's LoRAs is the plain computation: PEFT's own LoRA on the whole model, and AdamW."""

from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from chainfed_ray.budget.footprint import Footprint, SavedActivations, WeightPlacement
from chainfed_ray.budget.planner import Prefix, TurnPlan
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client, Training
from chainfed_ray.client.objective import LossFunction, Objective
from chainfed_ray.client.training import train
from chainfed_ray.data.tokens import Examples, ragged
from chainfed_ray.model.adapters import AdapterStack, LowRank, Tensors
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.pooling import LayerStates
from chainfed_ray.streaming.matrices import SLICE_BYTES
from tests.models import tiny_causal_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # and sets it
]
LAYERS, RANK, EPOCHS, RATE = 5, 3, 3, 1e-3
WINDOWS = [Window(0, 1), Window(2, 3), Window(3, 4)]


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of usual linear modules, one that stores them transposed, and one with biases."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_causal_model(request.param, tied=False, layers=LAYERS).save_pretrained(folder)
    return folder


def texts() -> Examples:
    """Five examples of unequal length, of which all tokens are to be predicted."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 128, length).astype(np.int32) for length in (9, 4, 7, 5, 9)]
    return ragged(rows, np.zeros(5, dtype=np.int64), [np.ones(len(row), dtype=bool) for row in rows])


def a_stack(folder: Path) -> AdapterStack:
    """LoRAs on all linear modules of all layers, far from those that change nothing."""
    blocks = Blocks(folder, torch.float32)
    stack = AdapterStack.new_lora({index: blocks.linear_modules(index) for index in range(LAYERS)}, RANK, seed=0)
    blocks.close()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return stack


def a_turn(
    folder: Path,
    scratch: Path,
    window: Window,
    exact: bool,
    weights: WeightPlacement = "resident",
    activations: SavedActivations = "kept",
    cached: bool = True,
    objective: Objective | None = None,
) -> tuple[Tensors, float]:
    """It takes two examples at a time."""
    buffers = Footprint(0, 2 * SLICE_BYTES, 0, 0, 0, 0, 0, 0, 0, 0)
    prefix = Prefix(2, weights, cached, planned_bytes=0, profile_bytes=0)
    client = Client("client", "any", texts(), 0, TurnPlan(window, 2, weights, activations, prefix, buffers, 0), 0)
    order = Training(
        a_stack(folder).tensors(),
        window,
        LAYERS - 1 if exact else window.top,
        epochs=EPOCHS,
        batch_size=5,
        learning_rate=RATE,
        head_learning_rate=RATE,
        global_weight=0,
        global_trains="head",
        seed=0,
        objective=objective,
    )
    blocks = Blocks(folder, torch.float32)
    try:
        update = train(client, blocks, scratch, order)
    finally:
        blocks.close()
    return update.tensors, update.loss


def plainly(folder: Path, window: Window) -> tuple[Tensors, float]:
    """The same by PEFT: the loss is that of the whole model, and the window's LoRAs are trained."""
    stack, batch = a_stack(folder), texts().batch(np.arange(5))
    base: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    names = sorted({path.rpartition(".")[2] for path in stack.inside(0)})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config)
    blocks = Blocks(folder, torch.float32)
    theirs = {
        f"adapters.{layer}.{path}.{part}.weight": model.get_submodule(
            f"base_model.model.{blocks.causal_layers_path}.{layer}.{path}.{part}.default"
        ).weight
        for layer in stack.layers
        for path in stack.inside(layer)
        for part in ("lora_A", "lora_B")
    }
    blocks.close()
    tensors = stack.tensors()
    assert theirs.keys() == tensors.keys()
    for name, parameter in theirs.items():
        parameter.data.copy_(tensors[name])
        parameter.requires_grad_(int(name.split(".")[1]) in window)
    trained = {name: parameter for name, parameter in theirs.items() if parameter.requires_grad}
    optimizer, losses = torch.optim.AdamW(trained.values(), RATE, weight_decay=0.0), []
    for _ in range(EPOCHS):
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        each = [
            cross_entropy(logits[row, : length - 1], batch.ids[row, 1:length])
            for row, length in enumerate(batch.mask.sum(1).tolist())
        ]
        loss = torch.stack(each).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {name: parameter.detach() for name, parameter in trained.items()}, sum(losses) / EPOCHS


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS[:2], ids=str)
def test_a_turn_has_the_gradient_of_the_whole_model(folder: Path, window: Window, tmp_path: Path) -> None:
    """Whether weights are resident or streamed, and whatever becomes of saved activations. Two of these ways change no bit."""
    expected, loss = plainly(folder, window)
    before = a_stack(folder).tensors()
    ways = product(get_args(WeightPlacement), get_args(SavedActivations))
    found = {way: a_turn(folder, tmp_path / "-".join(way), window, True, *way) for way in ways}
    for tensors, told in found.values():
        assert tensors.keys() == expected.keys()
        assert told == pytest.approx(loss, rel=1e-6)
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=RATE / 500)
            assert (tensor - before[name]).abs().max() > RATE
    plain = found["resident", "kept"]
    for way in (("streamed", "kept"), ("resident", "recomputed"), ("streamed", "recomputed")):
        assert found[way][1] == plain[1]
        assert all(torch.equal(tensor, plain[0][name]) for name, tensor in found[way][0].items())


@pytest.mark.slow
def test_a_prefix_that_is_made_for_each_step_changes_nothing(folder: Path, tmp_path: Path) -> None:
    cached, made = (a_turn(folder, tmp_path / str(cached), WINDOWS[1], True, cached=cached) for cached in (True, False))
    for name, tensor in cached[0].items():
        torch.testing.assert_close(made[0][name], tensor, rtol=0, atol=RATE / 500)


@pytest.mark.slow
def test_without_a_look_ahead_the_head_is_on_the_windows_output(folder: Path, tmp_path: Path) -> None:
    top, below = (a_turn(folder, tmp_path / str(window), window, False) for window in (WINDOWS[2], WINDOWS[1]))
    exact = a_turn(folder, tmp_path / "exact", WINDOWS[1], True)
    assert top[1] == pytest.approx(plainly(folder, WINDOWS[2])[1], rel=1e-6)
    assert below[1] != pytest.approx(exact[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS[:2], ids=str)
def test_an_objective_of_ones_own_is_told_the_window(folder: Path, window: Window, tmp_path: Path) -> None:
    told = set[Window]()

    def objective(stack: AdapterStack, given: Window, states: LayerStates, mask: Tensor, loss: LossFunction) -> Tensor:
        told.add(given)
        return loss(states, head_learns=True)

    a_turn(folder, tmp_path, window, True, objective=objective)
    assert told == {Window(window.bottom, LAYERS - 1)}


def test_a_new_lora_adds_nothing() -> None:
    inputs = torch.randn(2, 3, 8)
    assert not LowRank(8, 5, 2, seed=0)(inputs).any()
