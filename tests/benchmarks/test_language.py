"""The language benchmark: runs have the passes that were asked for, and passes are counted as they happen."""

from pathlib import Path

import pytest
import torch

from benchmarks.language_cell import METHODS, Run, counted, rounds_of
from chainfed_ray.chain import Window
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import through_window
from chainfed_ray.model.pooling import LayerStates, no_features
from tests.causal import a_lora_stack, causal_folder


def test_a_layer_counts_forward_and_backward(tmp_path: Path) -> None:
    saved = a_lora_stack(causal_folder("llama", tmp_path / "base"))
    blocks = Blocks(tmp_path / "base", torch.float32)
    layers, hidden = {index: blocks.load_layer(index) for index in range(2)}, torch.randn(3, 4, 32)
    with counted() as passes:
        states = LayerStates(hidden, no_features(hidden))
        mask = torch.ones(3, 4, dtype=torch.int64)
        with torch.no_grad():
            through_window(blocks, saved.stack, Window(-1, 1), layers, states, mask)
        through_window(blocks, saved.stack, Window(-1, 1), layers, states, mask).hidden.sum().backward()
    blocks.close()
    assert passes == [2 * 3, 2 * 2 * 3]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_has_as_many_rounds_as_there_are_passes_for(method: str) -> None:
    chain, share = METHODS[method]
    run = Run("", "banking77", method, 0.002, 0, 8000, 1, 1600, 1000)
    rounds = rounds_of(run, chain | {"look_ahead": chain.get("look_ahead", "exact")}, share)
    assert rounds == {"end-to-end": 26, "last-8": 75}.get(method, rounds)
    assert rounds > 10
