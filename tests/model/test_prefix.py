"""Promise: cached activations are those of a plain run through the layers, exactly, whatever came before."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from chainfed_ray.budget.planner import PREFIX_BATCH
from chainfed_ray.data.tokens import Examples
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.prefix import CachedActivations, PrefixCache, PrefixRunner
from tests.models import a_stack, tiny


def some_examples(count: int = 11) -> Examples:
    """Examples of unequal length, more than a micro-batch of them."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 9, count)
    ids = generator.integers(3, 128, lengths.sum()).astype(np.int32)
    return Examples(ids, np.concatenate([[0], lengths.cumsum()]), np.zeros(count, dtype=np.int64))


@torch.no_grad()
def plain(
    blocks: Blocks, examples: Examples, stack: AdapterStack, layer: int
) -> tuple[dict[int, Tensor], dict[int, list[Tensor]]]:
    """The output of ``layer`` for the real tokens of each example, with nothing kept on the way; means of those below it."""
    found, means = dict[int, Tensor](), {index: list[Tensor]() for index in range(len(examples))}
    for indices in examples.by_length(PREFIX_BATCH):
        batch = examples.batch(indices)
        hidden, calls = blocks.embed(batch.ids, batch.mask)
        for index in range(layer + 1):
            if index - 1 in stack.layers:
                hidden = stack.adapter(index - 1)(hidden)
            if index:
                for row, example in enumerate(indices.tolist()):
                    means[example].append(hidden[row, : int(examples.lengths[example])].float().mean(0))
            hidden = blocks.run(blocks.load_layer(index), hidden, calls[index])
        for row, index in enumerate(indices.tolist()):
            found[index] = hidden[row, : int(examples.lengths[index])]
    return found, means


def assert_plain(cache: PrefixCache, blocks: Blocks, examples: Examples, stack: AdapterStack, layer: int) -> None:
    cached, read = cache.at(layer, stack).batch(np.arange(len(examples)))
    assert torch.isfinite(cached).all()
    outputs, means = plain(blocks, examples, stack, layer)
    assert read.shape == (len(examples), min(layer, stack.pooled_layers), 32)
    for index, of_layers in means.items():
        for place in range(1, read.shape[1] + 1):
            torch.testing.assert_close(read[index, -place], of_layers[-place])
    for index, expected in outputs.items():
        assert torch.equal(cached[index, : len(expected)], expected), f"layer {layer}, example {index}"
        assert not cached[index, len(expected) :].any(), "padding"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("head_layers", [1, 3])
def test_advanced_layer_by_layer_is_plain(head_layers: int, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    blocks, examples = Blocks(tiny(family, tmp_path / "model"), dtype), some_examples()
    cache = PrefixCache(tmp_path / "cache", PrefixRunner(blocks), examples)
    for layer in range(1, 4):
        assert_plain(cache, blocks, examples, a_stack(range(1, 4), head_layers=head_layers), layer)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    return Blocks(tiny("bert", tmp_path_factory.mktemp("model")), torch.float32)


@pytest.mark.slow
@given(
    visits=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 4), st.booleans()), min_size=1, max_size=6
    )
)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_history_is_plain(blocks: Blocks, tmp_path: Path, visits: list[tuple[int, int, int, bool]]) -> None:
    """Windows up and down, stacks that differ, a cache that was lost on the way: never another stack's activations."""
    examples = some_examples()
    cache = PrefixCache(tmp_path / "cache", PrefixRunner(blocks), examples)
    cache.clear()
    for layer, seed, head_layers, lost in visits:
        if lost:
            cache.clear()
        cache = PrefixCache(tmp_path / "cache", PrefixRunner(blocks), examples)
        assert_plain(cache, blocks, examples, a_stack(range(0, 4), seed, head_layers), layer)


def test_only_what_lies_below_counts(blocks: Blocks, tmp_path: Path) -> None:
    """Adapters in and above the window are trained meanwhile: the cache stays as it is."""
    examples = some_examples()
    cache = PrefixCache(tmp_path, PrefixRunner(blocks), examples)
    cache.at(2, a_stack(range(2, 4)))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    cache.at(2, a_stack(range(2, 4), seed=1))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_what_was_left_half_written_is_not_used(blocks: Blocks, tmp_path: Path) -> None:
    examples, stack = some_examples(), a_stack(range(1, 4))
    PrefixCache(tmp_path, PrefixRunner(blocks), examples).at(1, stack)
    (whole,) = tmp_path.glob("0001-*.activations")
    whole.rename(whole.with_name(f"{whole.name}.123.partial"))
    whole.with_name(f"{whole.name}.123.partial").write_bytes(b"half")
    assert_plain(PrefixCache(tmp_path, PrefixRunner(blocks), examples), blocks, examples, stack, 1)


def test_a_cache_that_is_too_short_is_an_error(blocks: Blocks, tmp_path: Path) -> None:
    examples, stack = some_examples(), a_stack(range(1, 4))
    activations = PrefixCache(tmp_path, PrefixRunner(blocks), examples).at(1, stack)
    (whole,) = tmp_path.glob("0001-*.activations")
    with whole.open("r+b") as file:
        file.truncate(whole.stat().st_size - 1)
    with pytest.raises(OSError, match="ends within example"):
        activations.batch(np.arange(len(examples)))


def test_a_cache_that_is_gone_is_one_error(blocks: Blocks, tmp_path: Path) -> None:
    """And no second one from what was half made: that would be a warning, and so an error here."""
    with pytest.raises(FileNotFoundError):
        CachedActivations(tmp_path / "gone", blocks, some_examples(), pooled=0)
    gc.collect()
