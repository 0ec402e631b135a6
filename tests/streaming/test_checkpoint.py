"""Promise: a tensor that a checkpoint keeps in parts is read as one, whole, by rows and by its matrices."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.streaming.checkpoint import Checkpoint

SHAPE = (3, 4, 5)  # three experts of two parts each


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Parts of an expert's tensor that are stored in another order, and between others."""
    parts = {f"part-{place}": part.clone() for place, part in enumerate(a_tensor().view(6, 2, 5))}
    stored = {name: parts[name] for name in sorted(parts, reverse=True)} | {"other": torch.zeros(2, 5).half()}
    save_file(stored, tmp_path / "model.safetensors")
    found = Checkpoint(tmp_path)
    found.join("whole", [f"part-{place}" for place in range(6)], SHAPE)
    return found


def a_tensor() -> Tensor:
    return torch.arange(60, dtype=torch.float32).view(SHAPE)


def test_parts_are_read_as_one(checkpoint: Checkpoint) -> None:
    assert checkpoint.shape("whole") == SHAPE
    assert torch.equal(checkpoint.read("whole", torch.float32), a_tensor())
    assert torch.equal(checkpoint.read("whole", torch.bfloat16), a_tensor().bfloat16())
    picked = torch.tensor([2, 0, 2])
    assert torch.equal(checkpoint.rows("whole", picked, torch.float32), a_tensor()[picked])


@pytest.mark.parametrize("expert", range(3))
@pytest.mark.parametrize(("first", "count"), [(0, 4), (1, 2), (3, 1)])
def test_slices_of_one_matrix_may_cross_its_parts(expert: int, first: int, count: int, checkpoint: Checkpoint) -> None:
    name = checkpoint.matrix("whole", expert)
    assert checkpoint.shape(name) == SHAPE[1:]
    buffer = torch.empty(count * checkpoint.row_bytes(name), dtype=torch.uint8)
    rows = checkpoint.slice(name, first, count, buffer, torch.float32)
    assert torch.equal(rows, a_tensor()[expert, first : first + count])


@pytest.mark.parametrize("place", range(2))
def test_a_share_is_read_by_itself(place: int, checkpoint: Checkpoint) -> None:
    checkpoint.cut("share", "part-3", place, 2, (1, 5))
    assert torch.equal(checkpoint.read("share", torch.float32), a_tensor().view(12, 1, 5)[6 + place])
    with pytest.raises(UnsupportedModel, match="not one of 2 shares"):
        checkpoint.cut("less", "part-3", place, 2, (1, 4))


@pytest.mark.parametrize("parts", [["part-0"], ["part-0", "part-1", "other"]])
def test_parts_that_do_not_fill_the_tensor_are_refused(parts: list[str], checkpoint: Checkpoint) -> None:
    """One that is missing, and one of another dtype."""
    with pytest.raises(UnsupportedModel, match="do not fill it"):
        checkpoint.join("less", parts, (1, 6, 5))
