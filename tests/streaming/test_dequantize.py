"""Promise: quantized matrices are read as exactly the values that the gguf package gives, or bitsandbytes, in every form."""

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from chainfed_ray.block_forms import FORMS, to_metadata
from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.dequantize import AT_ONCE, dequantizing_bytes, to_values
from chainfed_ray.streaming.matrices import SliceReader
from chainfed_ray.streaming.numbers import check_numbers
from tests.gguf_files import random_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MATRICES = {"wide": (6, 512), "tall": (40, 256), "experts": (3, 4, 256)}


def some_blocks(form: str, *shape: int) -> Tensor:
    if form == "NF4":
        packed = torch.randint(256, (math.prod(shape) // 64, 32), dtype=torch.uint8)
        return torch.cat([torch.rand(len(packed), 1).view(torch.uint8), packed], dim=1).view(*shape[:-1], -1)
    return torch.from_numpy(random_blocks(np.random.default_rng(0), list(shape), form))


def by_gguf(form: str, blocks: Tensor) -> Tensor:
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[form]))


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if form != "NF4"])
def test_values_are_those_of_the_gguf_package(form: str) -> None:
    """Bit by bit; of more values than are computed at once."""
    assert FORMS[form] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
    blocks = some_blocks(form, 3, AT_ONCE // 2)
    expected = by_gguf(form, blocks).view(-1)
    for dtype in DTYPES:
        values = torch.empty(expected.shape, dtype=dtype)
        to_values(form, blocks.view(-1), values)
        assert torch.equal(values.view(torch.uint8), expected.to(dtype).view(torch.uint8))


def test_values_in_nf4_are_those_of_bitsandbytes() -> None:
    """Bit by bit, for every byte, in each dtype that a model is computed in; of more values than are computed at once."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    blocks = some_blocks("NF4", 3, AT_ONCE // 2).view(-1, FORMS["NF4"].bytes)
    blocks[:8, 4:] = torch.arange(256, dtype=torch.uint8).view(8, 32)
    largest, packed = blocks[:, :4].view(torch.float32).contiguous(), blocks[:, 4:].reshape(-1, 1)
    code, wanted = get_4bit_type("nf4", device="cpu"), torch.Size([3, AT_ONCE // 2])
    for dtype in DTYPES[:2]:
        state = QuantState(largest, wanted, code, 64, "nf4", dtype)
        values = torch.empty(wanted.numel(), dtype=dtype)
        to_values("NF4", blocks.view(-1), values)
        assert torch.equal(values.view(wanted), dequantize_4bit(packed, state))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("form", ["Q4_0", "Q5_1", "Q4_K", "NF4", "Q6_K", "IQ3_S"])
def test_what_it_takes_is_counted(form: str, dtype: torch.dtype) -> None:
    """By the allocations that PyTorch records, and with the blocks of the values that are computed at once."""
    blocks, values = some_blocks(form, 2, AT_ONCE), torch.empty(2 * AT_ONCE, dtype=dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        to_values(form, blocks.view(-1), values)
    results = recorded.profiler.kineto_results
    held = np.cumsum([event.nbytes() for event in results.events() if event.name() == "[memory]"])
    assert max(held, default=0) + blocks.nbytes // 2 <= dequantizing_bytes(form)


def a_checkpoint(folder: Path, form: str) -> dict[str, Tensor]:
    """Save quantized matrices in ``folder``; the values that they stand for."""
    folder.mkdir()
    blocks = {name: some_blocks(form, *shape) for name, shape in MATRICES.items()}
    save_file(blocks, folder / "model.safetensors", to_metadata(dict.fromkeys(blocks, form)))
    return {name: by_gguf(form, matrix) for name, matrix in blocks.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["Q4_0", "Q6_K"])
def test_a_quantized_matrix_is_read_like_another(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whole, by rows, by slices, and one of several experts; and its bytes are counted as they are on disk."""
    expected = {name: values.to(dtype) for name, values in a_checkpoint(tmp_path / "blocks", form).items()}
    checkpoint = Checkpoint(tmp_path / "blocks")
    size = FORMS[form]
    for name, values in expected.items():
        assert checkpoint.shape(name) == MATRICES[name]
        assert checkpoint.stored_bytes(name) == values.numel() // size.values * size.bytes
        assert checkpoint.loaded_bytes(name, dtype) == values.nbytes
        before = checkpoint.bytes_read
        assert torch.equal(checkpoint.read(name, dtype), values)
        assert checkpoint.bytes_read - before == checkpoint.stored_bytes(name)
    picked = torch.tensor([30, 2, 2, 39])
    assert torch.equal(checkpoint.rows("tall", picked, dtype), expected["tall"][picked])
    one, room = checkpoint.matrix("experts", 1), torch.empty(3 * 256 * 8, dtype=torch.uint8)
    assert torch.equal(checkpoint.slice(one, 1, 3, room, dtype), expected["experts"][1, 1:])
    checkpoint.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_slices_are_those_of_the_values(dtype: torch.dtype, tmp_path: Path) -> None:
    """So that sums over slices have the same bits as with the dequantized matrix."""
    expected = a_checkpoint(tmp_path / "blocks", "Q4_1")
    (tmp_path / "values").mkdir()
    save_file(expected, tmp_path / "values" / "model.safetensors")
    readers = [SliceReader(Checkpoint(tmp_path / name), dtype, slice_bytes=9000) for name in ("blocks", "values")]
    for name in ("wide", "tall", "wide"):
        for (first, rows), (same, plain) in zip(*(reader.slices(name) for reader in readers), strict=True):
            assert first == same
            assert torch.equal(rows, plain)
    for reader in readers:
        reader.close()


def test_scales_that_are_no_numbers_are_found(tmp_path: Path) -> None:
    blocks = some_blocks("Q4_0", 8, 64)
    blocks[5, 18:20] = torch.tensor([float("nan")]).half().view(torch.uint8)
    save_file({"matrix": blocks}, tmp_path / "model.safetensors", to_metadata({"matrix": "Q4_0"}))
    with pytest.raises(UnsupportedModel, match="no numbers"):
        check_numbers(Checkpoint(tmp_path), ["matrix"])


def test_parts_of_several_forms_are_not_joined(tmp_path: Path) -> None:
    blocks = {"a": some_blocks("Q4_0", 4, 64), "b": some_blocks("Q8_0", 4, 64)}
    save_file(blocks, tmp_path / "model.safetensors", to_metadata({"a": "Q4_0", "b": "Q8_0"}))
    with pytest.raises(UnsupportedModel, match="do not fill it"):
        Checkpoint(tmp_path).join("both", ["a", "b"], (8, 64))
