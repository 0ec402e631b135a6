"""Promise: a model streamed layer by layer is the whole Hugging Face model, exactly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.model.blocks import Blocks
from tests.models import ENCODERS, FAMILIES, MIXTURES, tiny, whole_outputs

DTYPES = (torch.float32, torch.bfloat16)


def a_batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 4, 7)):
        ids[row, length:] = 0
        mask[row, length:] = 0
    return ids, mask


def streamed(blocks: Blocks) -> list[Tensor]:
    ids, mask = a_batch()
    hidden, calls = blocks.embed(ids, mask)
    outputs = []
    with torch.no_grad():
        for index, call in enumerate(calls):
            hidden = blocks.run(blocks.load_layer(index), hidden, call)
            outputs.append(hidden)
    return outputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS, *MIXTURES])
def test_streamed_is_whole(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if (family, dtype) == ("xlnet", torch.bfloat16):
        pytest.skip("Hugging Face's own model does not run in it")
    blocks = Blocks(tiny(family, tmp_path), dtype)
    ours, theirs = streamed(blocks), whole_outputs(tmp_path, dtype, blocks.layers_path, *a_batch())
    assert len(ours) == len(theirs) == blocks.num_layers == 4
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its)
    assert not torch.equal(ours[0], ours[1])


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS])
def test_calls_without_embeddings_are_the_same_calls(family: str, tmp_path: Path) -> None:
    blocks = Blocks(tiny(family, tmp_path), torch.float32)
    ids, mask = a_batch()
    hidden, from_embedding = blocks.embed(ids, mask)
    from_mask = blocks.calls(mask)
    assert len(from_mask) == len(from_embedding) == 4
    for index in range(4):
        layer = blocks.load_layer(index)
        assert torch.equal(
            blocks.run(layer, hidden, from_mask[index]), blocks.run(layer, hidden, from_embedding[index])
        )


def test_sharded_checkpoint_is_the_single_one(tmp_path: Path) -> None:
    single = tiny("bert", tmp_path / "single")
    AutoModel.from_pretrained(single).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    ours = streamed(Blocks(tmp_path / "sharded", torch.float32))
    assert torch.equal(ours[-1], streamed(Blocks(single, torch.float32))[-1])


def test_a_checkpoint_with_a_head_is_read_by_its_prefix(tmp_path: Path) -> None:
    bare = tiny("roberta", tmp_path / "bare")
    with_head = AutoModelForSequenceClassification.from_pretrained(bare)
    with_head.save_pretrained(tmp_path / "headed")
    assert torch.equal(
        streamed(Blocks(tmp_path / "headed", torch.float32))[-1], streamed(Blocks(bare, torch.float32))[-1]
    )


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    file = tiny("bert", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UnsupportedModel, match="truncated"):
        Blocks(tmp_path, torch.float32)


def test_what_is_stored_in_another_dtype_is_counted_as_it_is(tmp_path: Path) -> None:
    """One matrix of one layer is kept in bfloat16: it is converted as it is loaded, and nothing else is."""
    folder = tiny("bert", tmp_path)
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    plain = Blocks(folder, torch.float32)
    before = plain.layer_bytes, plain.unstreamed_bytes, plain.longest_row_bytes
    assert plain.conversion_bytes == 0
    plain.close()
    name = next(name for name in tensors if name.endswith("layer.2.intermediate.dense.weight"))
    save_file(tensors | {name: tensors[name].bfloat16()}, path, {"format": "pt"})
    mixed = Blocks(folder, torch.float32)
    assert mixed.conversion_bytes == tensors[name].numel() * 2
    assert (mixed.layer_bytes, mixed.unstreamed_bytes, mixed.longest_row_bytes) == before
    mixed.close()
