"""Promise: a turn on quantized weights is the turn on their values, bit by bit, and its plan counts what dequantizing takes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from chainfed_ray.budget.footprint import Footprint, WeightPlacement
from chainfed_ray.budget.planner import Prefix, TurnPlan
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client, Training, Update
from chainfed_ray.client.turn import take_turn
from chainfed_ray.data.tokens import Examples
from chainfed_ray.hub import resolve
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import memory_profile_of
from chainfed_ray.model.source import ModelSource
from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.dequantize import dequantizing_bytes
from tests.gguf_files import a_gguf


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model whose matrices are quantized, and the same with their values."""
    monkeypatch.setenv("CHAINFED_MODELS", str(tmp_path / "models"))
    quantized = resolve(f"path:{a_gguf(tmp_path / 'small.gguf', 'Q4_1', num_hidden_layers=3)}")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_bytes((quantized / "config.json").read_bytes())
    checkpoint = Checkpoint(quantized)
    save_file({name: checkpoint.read(name, torch.float32) for name in checkpoint.names}, plain / "model.safetensors")
    checkpoint.close()
    return quantized, plain


def a_turn(folder: Path, dtype: torch.dtype, weights: WeightPlacement, scratch: Path) -> Update:
    """A turn of two steps on eight random texts, with a layer below the window."""
    ids = np.random.default_rng(0).integers(3, 200, 8 * 12).astype(np.int32)
    examples = Examples(ids, np.arange(9, dtype=np.int64) * 12, np.zeros(8, dtype=np.int64))
    window, prefix = Window(1, 2), Prefix(4, weights, cached=True, planned_bytes=0, profile_bytes=0)
    plan = TurnPlan(window, 2, weights, "kept", prefix, Footprint(0, 1, 0, 0, 0, 0, 0, 0, 0, 0), 0)
    client = Client("client", "client", replace(examples, targets=examples.every_token), 0, plan, 0)
    stack = AdapterStack.new(range(3), 64, 8, None, seed=0)
    order = Training(
        stack.tensors(), window, window.top, epochs=1, batch_size=4, learning_rate=0.01, head_learning_rate=0.01,
        global_weight=0.1, global_trains="head", seed=0,
    )  # fmt: skip
    update = take_turn(client, ModelSource(folder, dtype, scratch), lambda: order, capped=False)
    assert isinstance(update, Update)
    return update


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_turn_has_the_bits_of_the_dequantized_model(
    dtype: torch.dtype, weights: WeightPlacement, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    quantized, plain = (a_turn(folder, dtype, weights, tmp_path / folder.name) for folder in folders)
    assert quantized.loss == plain.loss
    assert quantized.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(tensor, plain.tensors[name]) for name, tensor in quantized.tensors.items())
    assert any(tensor.abs().max() > 0 for tensor in quantized.tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_bytes_are_planned_and_what_dequantizing_takes(dtype: torch.dtype, folders: tuple[Path, Path]) -> None:
    """A matrix that is converted to bfloat16 is held in both dtypes; a quantized one is not."""
    profiles, stored = [], []
    for folder in folders:
        blocks = Blocks(folder, dtype)
        profiles.append(memory_profile_of(blocks, 8, None))
        blocks.close()
        stored.append((folder / "model.safetensors").stat().st_size)
    quantized, plain = profiles
    taken = dequantizing_bytes("Q4_1")
    assert quantized == replace(plain, slices=plain.slices + taken, conversion=taken)
    assert stored[0] < 0.25 * stored[1]
