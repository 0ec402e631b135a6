"""Promise: a mixture of experts, streamed, is the resident one, whose matrices of idle experts are not read."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.streaming.checkpoint import Checkpoint
from tests.models import MIXTURES, tiny, tiny_model
from tests.watching import CountedSlices


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(blocks: Blocks, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The output of layer 1, and the gradient of its input."""
    hidden = hidden.clone().requires_grad_()
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64)
    output = blocks.run(layer, hidden, blocks.calls(mask)[1])
    (output * some(*output.shape, seed=1)).sum().backward()
    assert hidden.grad is not None
    return output.detach(), hidden.grad


@pytest.mark.slow
@pytest.mark.parametrize("family", MIXTURES)
def test_a_streamed_mixture_is_the_resident_one(family: str, tmp_path: Path) -> None:
    blocks = Blocks(tiny(family, tmp_path), torch.float32)
    source = CountedSlices(blocks.reader(slice_bytes=512))
    resident, streamed = blocks.load_layer(1), blocks.load_layer(1, source)
    hidden = some(2, 5, 32)
    torch.testing.assert_close(run(blocks, streamed, hidden), run(blocks, resident, hidden))
    experts = [count for name, count in source.counts.items() if "experts" in name]
    assert min(experts) >= 2 * 4, "forward and backward, in several slices"
    kept = sum(tensor.nbytes for tensor in streamed.parameters())
    assert kept == blocks.unstreamed_bytes < blocks.layer_bytes / 10
    source.reader.close()


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_without_a_token_are_not_read(family: str, tmp_path: Path) -> None:
    """One token is sent to two or four of five experts."""
    blocks = Blocks(tiny(family, tmp_path), torch.float32)
    source = CountedSlices(blocks.reader(slice_bytes=512))
    run(blocks, blocks.load_layer(1, source), some(1, 1, 32))
    used = 4 if family == "gpt_oss" else 2
    experts = [name for name in source.counts if "experts" in name]
    assert len(experts) == 2 * used, "two matrices each"
    source.reader.close()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_checkpoint_may_have_the_experts_together_or_one_by_one(family: str, tmp_path: Path) -> None:
    """Transformers saves them one by one; others keep the parameters of its models."""
    apart, together = tiny(family, tmp_path / "apart"), tiny(family, tmp_path / "together")
    save_file(dict(tiny_model(family).state_dict()), together / "model.safetensors", {"format": "pt"})
    assert any("experts.0." in name for name in Checkpoint(apart).names)
    assert not any("experts.0." in name for name in Checkpoint(together).names)
    outputs = [run(blocks, blocks.load_layer(1), some(2, 5, 32)) for blocks in map(opened, (apart, together))]
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


def opened(folder: Path) -> Blocks:
    return Blocks(folder, torch.float32)


def test_a_checkpoint_without_one_of_the_experts_is_refused(tmp_path: Path) -> None:
    path = tiny("mixtral", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1." in name and "experts.3." in name)
    save_file({it: tensors[it] for it in tensors if it != name}, path, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.experts\.\w+"):
        opened(tmp_path).load_layer(1)


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_layers_that_predict_further_tokens_may_be_stored_after_the_models_own(key: str, tmp_path: Path) -> None:
    path = tiny("mixtral", tmp_path) / "model.safetensors"
    tensors, layers = load_file(path), opened(tmp_path).num_layers
    config = json.loads((tmp_path / "config.json").read_text())
    further = f"model.layers.{layers}.eh_proj.weight"
    save_file({**tensors, further: torch.ones(4)}, path, {"format": "pt"})
    refused = rf"its configuration has {layers} layers, and its checkpoint a tensor "
    with pytest.raises(UnsupportedModel, match=refused + re.escape(further)):
        opened(tmp_path).check()
    (tmp_path / "config.json").write_text(json.dumps(config | {key: 1}))
    opened(tmp_path).check()
    above = further.replace(str(layers), str(layers + 1))
    save_file({**tensors, above: torch.ones(4)}, path, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=refused + re.escape(above)):
        opened(tmp_path).check()
