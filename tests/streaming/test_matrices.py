"""Promise: matrices that are streamed by slices give what resident ones give, and take two slices of memory."""

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.matrices import SliceReader, StreamedLinear
from tests.models import FAMILIES, tiny
from tests.watching import CountedSlices, tensors_alive

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPES = {"a": (7, 5), "b": (1, 3), "c": (12, 16), "d": (9, 1)}


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def a_checkpoint(folder: Path, dtype: torch.dtype) -> Path:
    """Matrices of unlike shapes."""
    folder.mkdir()
    tensors = {name: some(*shape, dtype=dtype, seed=ord(name)) for name, shape in SHAPES.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """A checkpoint in each dtype."""
    return {dtype: a_checkpoint(tmp_path_factory.mktemp("kept") / "model", dtype) for dtype in DTYPES}


visits = st.lists(st.tuples(st.sampled_from(sorted(SHAPES)), st.none() | st.integers(0, 4)), min_size=1, max_size=12)


@pytest.mark.slow
@given(kept=st.sampled_from(DTYPES), dtype=st.sampled_from(DTYPES), slice_bytes=st.integers(1, 400), visits=visits)
@settings(deadline=None, max_examples=60)
def test_every_row_once_and_in_order(
    folders: dict[torch.dtype, Path],
    kept: torch.dtype,
    dtype: torch.dtype,
    slice_bytes: int,
    visits: list[tuple[str, int | None]],
) -> None:
    """Whatever the slice, whichever matrix comes next, and also after one that was left after so many slices."""
    checkpoint = Checkpoint(folders[kept])
    reader = SliceReader(checkpoint, dtype, slice_bytes)
    for name, most in visits:
        found = []
        for first, rows in reader.slices(name):
            if most is not None and len(found) >= most:
                break
            assert first == sum(map(len, found))
            found.append(rows.clone())
        expected = checkpoint.read(name, dtype)
        seen = torch.cat(found) if found else expected[:0]
        assert torch.equal(seen, expected[: len(seen)])
        assert len(seen) == len(expected) or most is not None
    reader.close()
    checkpoint.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", DTYPES, ids=str)
def test_numbers_of_a_vector_are_read_between_slices(kept: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"matrix": some(7, 5, dtype=kept), "vector": some(7, dtype=kept, seed=1)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    reader = SliceReader(checkpoint, dtype, slice_bytes=60)
    matrix, vector = checkpoint.read("matrix", dtype), checkpoint.read("vector", dtype)
    for first, rows in reader.slices("matrix"):
        assert torch.equal(reader.numbers("vector", first, len(rows)), vector[first : first + len(rows)])
        assert torch.equal(rows, matrix[first : first + len(rows)])
    reader.close()
    checkpoint.close()


class Watched(Checkpoint):
    """Says when a slice has been read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads = threading.Semaphore(0)

    def slice(self, *args: object) -> Tensor:
        rows = super().slice(*args)  # type: ignore[arg-type]
        self.reads.release()
        return rows


def test_the_next_slice_is_loaded_meanwhile_and_not_over_the_present_one(folders: dict[torch.dtype, Path]) -> None:
    """Of the same matrix, and of the one that followed last time."""
    checkpoint = Watched(folders[torch.float32])
    reader = SliceReader(checkpoint, torch.float32, slice_bytes=40)
    for visit, name in enumerate("acacac"):
        expected = checkpoint.read(name, torch.float32)
        slices = 4 if name == "a" else 12
        for place, (first, rows) in enumerate(reader.slices(name)):
            guessed = visit > 3 and place == 0
            known = place < slices - 1 or visit > 2  # what comes next
            for _ in range((0 if guessed or place else 1) + known):
                assert checkpoint.reads.acquire(timeout=30)
            assert torch.equal(rows, expected[first : first + len(rows)])
    reader.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", DTYPES, ids=str)
def test_a_reader_takes_two_slices_of_memory(
    folders: dict[torch.dtype, Path], kept: torch.dtype, dtype: torch.dtype
) -> None:
    """With the slice that is being read and the one that is being used, and what a conversion takes."""
    reader = SliceReader(Checkpoint(folders[kept]), dtype, slice_bytes=260)
    before = {tensor.untyped_storage().data_ptr() for tensor in tensors_alive()}
    for name in "acda":
        for place, (_, rows) in enumerate(reader.slices(name)):
            assert rows.dtype == dtype
            if place != 1:
                continue
            storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors_alive()}
            assert sum(storage.nbytes() for identity, storage in storages.items() if identity not in before) <= 520
    reader.close()


def test_a_checkpoint_that_gets_shorter_is_an_error_of_the_reader(tmp_path: Path) -> None:
    reader = SliceReader(Checkpoint(a_checkpoint(tmp_path / "model", torch.float32)), torch.float32, slice_bytes=20)
    slices = reader.slices("c")
    next(slices)
    os.truncate(tmp_path / "model" / "model.safetensors", 8)
    with pytest.raises(UnsupportedModel, match="got shorter"):
        list(slices)
    running = threading.active_count()
    reader.close()
    assert threading.active_count() == running - 1


def a_layer(folder: Path, transposed: bool, bias: bool, dtype: torch.dtype) -> tuple[nn.Module, StreamedLinear]:
    """A stock layer of 6 inputs and 10 outputs, and the streamed one of the same matrix, in slices of two rows or so."""
    stock = Conv1D(10, 6) if transposed else nn.Linear(6, 10, bias=bias)
    stock = stock.to(dtype).requires_grad_(False)
    if bias:
        stock.bias.copy_(some(10))
    save_file({"matrix": stock.weight.data}, folder / "model.safetensors")
    reader = SliceReader(Checkpoint(folder), dtype, slice_bytes=20 * dtype.itemsize)
    streamed = StreamedLinear(reader, "matrix", tuple(stock.weight.shape), bias, transposed)
    if bias:
        streamed.bias = stock.bias
    return stock, streamed


KINDS = [
    (False, True),
    (False, False),
    (True, True),
]  # transposed or not, with a bias or without; Conv1D always has one


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 5, 6), (1, 1, 6)], ids=str)
@pytest.mark.parametrize(("transposed", "bias"), KINDS)
def test_a_streamed_linear_layer_is_the_stock_one(
    transposed: bool, bias: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    layers = a_layer(tmp_path, transposed, bias, torch.float32)
    found = []
    for layer in layers:
        inputs = some(*shape).requires_grad_()
        output = layer(inputs)
        (output * some(*output.shape, seed=1)).sum().backward()
        found.append((output, inputs.grad))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(("transposed", "bias"), KINDS)
def test_the_gradient_is_that_of_the_function(transposed: bool, bias: bool, tmp_path: Path) -> None:
    streamed = a_layer(tmp_path, transposed, bias, torch.float64)[1]
    inputs = some(2, 3, 6, dtype=torch.float64).transpose(0, 1).requires_grad_()
    assert torch.autograd.gradcheck(streamed, (inputs,))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("family", [*FAMILIES, "deberta-v2", "albert", "t5", "bart"])
def test_a_streamed_layer_is_the_resident_one(family: str, shards: bool, tmp_path: Path) -> None:
    folder = tiny(family, tmp_path / "single")
    if shards:
        AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        folder = tmp_path / "shards"
        assert len(list(folder.glob("*.safetensors"))) > 1
    blocks = Blocks(folder, torch.float32)
    source = CountedSlices(blocks.reader(slice_bytes=512))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    call = blocks.calls(mask)[1]
    found = []
    for layer in (blocks.load_layer(1), blocks.load_layer(1, source)):
        hidden = some(2, 5, 32).requires_grad_()
        output = blocks.run(layer, hidden, call)
        (output * some(2, 5, 32, seed=1)).sum().backward()
        found.append((output, hidden.grad))
    torch.testing.assert_close(found[1], found[0])
    assert len(source.counts) >= 4
    assert min(source.counts.values()) >= 2 * 4, "forward and backward, in several slices"
    assert not any(isinstance(module, nn.Linear | Conv1D) for module in layer.modules())
    resident = [*layer.parameters(), *layer.buffers()]
    # T5's first layer, its largest, has a table of positions besides.
    assert sum(tensor.nbytes for tensor in resident) <= blocks.unstreamed_bytes < blocks.layer_bytes / 15
    assert family == "t5" or sum(tensor.nbytes for tensor in resident) == blocks.unstreamed_bytes
    assert all(tensor.dim() == 1 and not tensor.requires_grad for tensor in resident)
    source.reader.close()
