"""Promise: a turn of a classifier's LoRAs is the plain computation: PEFT's own LoRA on the whole encoder, a head, and AdamW."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm, linear
from transformers import AutoModel

from chainfed_ray.budget.footprint import Footprint
from chainfed_ray.budget.planner import Prefix, TurnPlan
from chainfed_ray.chain import Window
from chainfed_ray.client.head_sums import ClassSums, sum_features
from chainfed_ray.client.messages import Client, Fitting, Training
from chainfed_ray.client.training import train
from chainfed_ray.data.tokens import Examples, ragged
from chainfed_ray.model.adapters import AdapterStack, Tensors, of_ranks
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.streaming.matrices import SLICE_BYTES
from tests.models import a_lora_classifier, tiny

# PEFT reads it from the model.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LAYERS, CLASSES, EPOCHS, RATE, HEAD_RATE = 4, 3, 3, 1e-3, 2e-3
WINDOWS = [(Window(0, 1), True), (Window(1, 2), False), (Window(2, 3), True)]  # with an exact look-ahead or none


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(request.param, tmp_path_factory.mktemp(request.param), LAYERS)


def texts() -> Examples:
    """Five examples of unequal length."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 128, length).astype(np.int32) for length in (9, 4, 7, 5, 9)]
    return ragged(rows, np.array([0, 2, 1, 0, 2]))


def a_stack(folder: Path, new: bool = False) -> AdapterStack:
    """LoRAs on all linear modules of all layers, and a head of three layers' features; as ``new``, or with random values."""
    stack = a_lora_classifier(folder, tuple(range(LAYERS)), CLASSES).stack
    for layer in stack.layers if new else ():
        for part in stack.inside(layer).values():
            torch.nn.init.zeros_(part.lora_B.weight)
    return stack


def a_client(window: Window, cached: bool = True, rank: int | None = None) -> Client:
    buffers = Footprint(0, 2 * SLICE_BYTES, 0, 0, 0, 0, 0, 0, 0, 0)
    prefix = Prefix(2, "streamed", cached, planned_bytes=0, profile_bytes=0)
    plan = TurnPlan(window, 2, "streamed", "recomputed", prefix, buffers, 0, rank)
    return Client("client", "any", texts(), 0, plan, 0)


def of_peft(folder: Path, stack: AdapterStack) -> tuple[Any, Tensors]:
    """The whole model with PEFT's LoRAs of the values of ``stack``, and their parameters by our names."""
    names = sorted({path.rpartition(".")[2] for path in stack.inside(0)})
    blocks = Blocks(folder, torch.float32)
    blocks.close()
    layers = f"{blocks.layers_path}."
    base: Any = AutoModel.from_pretrained(folder).eval()
    paths = [path for path, _ in base.named_modules() if path.startswith(layers) and path.rpartition(".")[2] in names]
    model: Any = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=paths))
    theirs = {
        f"adapters.{name.removeprefix(f'base_model.model.{layers}').replace('.default', '')}": parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    tensors = stack.tensors()
    assert theirs.keys() == {name for name in tensors if name.startswith("adapters.")}
    for name, parameter in theirs.items():
        parameter.data.copy_(tensors[name])
    return model, theirs


def features_of(model: Any, top: int) -> Tensor:
    """The means over tokens of the three layers up to ``top``, normalised, [B, r, D]."""
    batch = texts().batch(np.arange(5))
    states = model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True).hidden_states[1:]
    mask = batch.mask.unsqueeze(-1)
    means = torch.stack([(hidden * mask).sum(1) / mask.sum(1) for hidden in states[max(top - 2, 0) : top + 1]], 1)
    return layer_norm(means, means.shape[-1:])


def plainly(folder: Path, window: Window, exit: int, ranks: int = 3) -> tuple[Tensors, float]:
    """The turn by PEFT: the loss is that of the head on the layer ``exit``; the window's LoRAs and the head are trained.

    Of each LoRA the first ``ranks`` alone are trained: the gradients of the others are zeros.
    """
    stack = a_stack(folder)
    model, theirs = of_peft(folder, stack)
    head = {name: tensor.requires_grad_() for name, tensor in stack.tensors().items() if name.startswith("head.")}
    for name, parameter in theirs.items():
        parameter.requires_grad_(int(name.split(".")[1]) in window)
    trained = {name: parameter for name, parameter in theirs.items() if parameter.requires_grad}
    groups = [{"params": trained.values()}, {"params": head.values(), "lr": HEAD_RATE}]
    optimizer, losses = torch.optim.AdamW(groups, RATE, weight_decay=0.0), []
    labels = torch.from_numpy(texts().labels)
    for _ in range(EPOCHS):
        features = (features_of(model, exit) * head["head.norm.weight"] + head["head.norm.bias"]).flatten(1)
        weight = head["head.linear.weight"][:, -features.shape[1] :]
        loss = cross_entropy(linear(features, weight, head["head.linear.bias"]), labels)
        optimizer.zero_grad()
        loss.backward()
        for parameter in of_ranks({name: tensor.grad for name, tensor in trained.items()}, slice(ranks, None)).values():
            parameter.zero_()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {name: tensor.detach() for name, tensor in (trained | head).items()}, sum(losses) / EPOCHS


@pytest.mark.slow
@pytest.mark.parametrize(("window", "exact"), WINDOWS, ids=str)
def test_a_turn_is_pefts_own(folder: Path, window: Window, exact: bool, tmp_path: Path) -> None:
    before = a_stack(folder).tensors()
    exit = LAYERS - 1 if exact else window.top
    order = Training(
        before, window, exit, epochs=EPOCHS, batch_size=5, learning_rate=RATE, head_learning_rate=HEAD_RATE,
        global_weight=0, global_trains="head", seed=0,
    )  # fmt: skip
    blocks = Blocks(folder, torch.float32)
    update = train(a_client(window), blocks, tmp_path, order)
    blocks.close()
    expected, loss = plainly(folder, window, exit)
    assert update.tensors.keys() == expected.keys()
    assert update.loss == pytest.approx(loss, rel=1e-6)
    for name, tensor in expected.items():
        torch.testing.assert_close(update.tensors[name], tensor, rtol=0, atol=RATE / 200)
        assert (tensor - before[name]).abs().max() > RATE


@pytest.mark.slow
def test_a_client_of_fewer_ranks_has_the_same_loss_and_trains_the_first(folder: Path, tmp_path: Path) -> None:
    window, before = Window(1, 2), a_stack(folder).tensors()
    order = Training(
        before, window, 2, epochs=EPOCHS, batch_size=5, learning_rate=RATE, head_learning_rate=HEAD_RATE,
        global_weight=0, global_trains="head", seed=0,
    )  # fmt: skip
    blocks = Blocks(folder, torch.float32)
    update = train(a_client(window, rank=2), blocks, tmp_path, order)
    blocks.close()
    expected, loss = plainly(folder, window, 2, ranks=2)
    assert update.loss == pytest.approx(loss, rel=1e-6)
    for name, tensor in of_ranks(expected, slice(2)).items():
        torch.testing.assert_close(update.tensors[name], tensor, rtol=0, atol=RATE / 200)


@pytest.mark.slow
@pytest.mark.parametrize(("new", "cached"), [(True, True), (False, True), (False, False)])
def test_the_sums_of_a_fitted_head_are_of_what_peft_computes(
    folder: Path, new: bool, cached: bool, tmp_path: Path
) -> None:
    """In the first pass of a new chain, and through a window whose LoRAs are trained."""
    stack = a_stack(folder, new)
    blocks = Blocks(folder, torch.float32)
    order = Fitting(stack.tensors(), Window(1, 2), 2)
    found = sum_features(a_client(Window(1, 2), cached), blocks, tmp_path, order).tensors
    blocks.close()
    expected = ClassSums.zeros(CLASSES, 3 * 32)
    with torch.no_grad():
        expected.count(features_of(of_peft(folder, stack)[0], 2).flatten(1), torch.from_numpy(texts().labels))
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)
