"""Promise: a tensor that a checkpoint keeps in parts is read as one, whole, by rows and by its matrices."""

import json
from pathlib import Path
from typing import Any

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


NAME = "part-3"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data_offsets": [-8, 32]}, "a shape and offsets of part-3 that are not counts"),
        ({"data_offsets": [40, 0]}, r"has -40 bytes for part-3, which does not fit its shape \[2, 5\]"),
        ({"data_offsets": [0, 40]}, "tensors that overlap, or bytes that are of no tensor"),
        ({"data_offsets": [0, 36]}, "has 36 bytes for part-3"),
        ({"data_offsets": [10**6, 10**6 + 40]}, "truncated: part-3 ends beyond the file"),
        ({"data_offsets": None}, "has a broken header"),
        ({"shape": [True, 10]}, "not counts"),
        ({"dtype": "F8_E4M3"}, "has part-3 in the dtype F8_E4M3, which is not supported"),
        ({"dtype": ["F32"]}, "has a broken header"),
    ],
)
def test_a_header_that_lies_is_refused(change: dict[str, Any], reason: str, checkpoint: Checkpoint) -> None:
    """What it says would be read from other bytes of the file."""
    path = checkpoint.folder / "model.safetensors"
    stored = path.read_bytes()
    length = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + length])
    header[NAME] |= change
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + stored[8 + length :])
    with pytest.raises(UnsupportedModel, match=f"model.safetensors .*{reason}"):
        Checkpoint(checkpoint.folder)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid x", "a pointer of git-lfs"),
        ("model.safetensors", (2 * 10**8).to_bytes(8, "little") + b"{}", "its header has 200000000 bytes"),
        ("model.safetensors", (4).to_bytes(8, "little") + b"[{}]", "its header is not an object"),
        ("model.safetensors", b"", "its header is longer than the file"),
        ("model.safetensors.index.json", b"[]", "is not the index of a checkpoint"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 3}}', "is not the index of a checkpoint"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": ".."}}', "which is no file of this folder"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "b.safetensors is missing"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.write(content)
        if b"{}" in content:
            file.truncate(3 * 10**8)  # a hole, which takes no room
    with pytest.raises(UnsupportedModel, match=reason):
        Checkpoint(tmp_path)
