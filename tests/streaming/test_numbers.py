"""Promise: weights that are no numbers are found; of a large checkpoint as much is read as was allowed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.streaming.numbers import check_numbers
from tests.watching import CountedReads


def a_checkpoint(folder: Path, place: tuple[int, int] | None, number: float, dtype: torch.dtype) -> CountedReads:
    """A matrix of 4 MiB, with one number of its own, and a vector of integers."""
    matrix = torch.zeros(1024, 2**22 // 1024 // dtype.itemsize, dtype=dtype)
    if place:
        matrix[place] = number
    save_file({"matrix": matrix, "steps": torch.arange(3)}, folder / "model.safetensors")
    return CountedReads(folder)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (511, 7), (-1, -1)], ids=str)
def test_one_number_is_found_wherever_it_is(
    place: tuple[int, int], number: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = a_checkpoint(tmp_path, place, number, dtype)
    with pytest.raises(UnsupportedModel, match="matrix has weights that are no numbers"):
        check_numbers(checkpoint, checkpoint.names)


def test_numbers_are_numbers(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path, (3, 3), torch.finfo(torch.float32).max, torch.float32)
    check_numbers(checkpoint, checkpoint.names)
    assert checkpoint.read_bytes == 4 * 2**20


def test_of_a_large_checkpoint_a_share_is_read(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path, None, 0.0, torch.float32)
    check_numbers(checkpoint, checkpoint.names, looked_at=2 * 2**20)
    assert checkpoint.read_bytes == 2 * 2**20
