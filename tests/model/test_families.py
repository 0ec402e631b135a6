"""Promise: each family of decoders, streamed layer by layer and its head by rows, is its whole Hugging Face model."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    RobertaConfig,
    RobertaForCausalLM,
)

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import Parts, memory_profile_of
from chainfed_ray.model.lm_head import logits_by_slices, next_token_loss, next_token_scores
from chainfed_ray.model.trace import trace_memory
from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.matrices import SliceReader
from tests.models import TIED, UNTIED, tiny_causal_model

DECODERS = [*((family, True) for family in TIED), *((family, False) for family in UNTIED)]
# Ours makes logits of the products in float32; theirs in bfloat16, with a rounding or three.
ROUNDS = {"gemma2", "gemma3_text", "gemma3", "cohere", "granite"}
LENGTHS = (9, 2, 7, 1, 9)
every_decoder = pytest.mark.parametrize(
    ("family", "tied"), DECODERS, ids=[f"{family}-{'tied' if tied else 'untied'}" for family, tied in DECODERS]
)


class Decoder(NamedTuple):
    """A model of Hugging Face's, and the same one in our blocks."""

    model: Any
    blocks: Blocks
    folder: Path


def a_decoder(family: str, tied: bool, folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Four layers of random numbers, so that sliding windows alternate."""
    tiny_causal_model(family, tied, layers=4).save_pretrained(folder)
    return opened(folder, dtype)


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    return Decoder(model, Blocks(folder, dtype), folder)


def a_batch() -> tuple[Tensor, Tensor]:
    """Examples of unequal length, padded on the right; longer than a sliding window of 4."""
    ids = torch.randint(3, 128, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(LENGTHS))[None, :] < torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask


def responses() -> Tensor:
    """Targets as instructions have them: an example's last tokens; the last example has none."""
    _, mask = a_batch()
    places, lengths = torch.arange(mask.shape[1])[None, :], torch.tensor(LENGTHS)[:, None]
    targets = mask.bool() & (places >= lengths - torch.tensor([3, 1, 5, 1, 0])[:, None])
    targets[:, 0] = False
    return targets


def layer_outputs(decoder: Decoder) -> tuple[list[Tensor], Tensor]:
    """The output of each layer of the whole model, and its logits."""
    outputs: list[Tensor] = []
    layers = decoder.model.base_model.get_submodule(decoder.blocks.layers_path)
    hooks = [
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    ids, mask = a_batch()
    with torch.no_grad():
        logits = decoder.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return outputs, logits


@torch.no_grad()
def streamed(blocks: Blocks) -> list[Tensor]:
    ids, mask = a_batch()
    hidden, calls = blocks.embed(ids, mask)
    outputs = []
    for index, call in enumerate(calls):
        hidden = blocks.run(blocks.load_layer(index), hidden, call)
        outputs.append(hidden)
    return outputs


def a_reader(decoder: Decoder) -> SliceReader:
    """The head in many slices: of 1 KiB, or 8 rows in float32."""
    return SliceReader(Checkpoint(decoder.folder), decoder.blocks.dtype, slice_bytes=1024)


@torch.no_grad()
def streamed_logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    _, mask = a_batch()
    finished, reader = decoder.blocks.finish(hidden, mask), a_reader(decoder)
    pieces = list(logits_by_slices(decoder.blocks, finished.reshape(-1, finished.shape[-1]), reader))
    reader.close()
    assert len(pieces) > 4
    return torch.cat([logits for _, logits in pieces], dim=1).view(*hidden.shape[:2], -1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_decoder
def test_streamed_is_whole(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Layers bit for bit; logits as well in bfloat16, and in float32 but for the order of a product's sums."""
    decoder = a_decoder(family, tied, tmp_path, dtype)
    outputs, logits = layer_outputs(decoder)
    ours = streamed(decoder.blocks)
    assert len(ours) == len(outputs) == len(decoder.model.get_submodule(decoder.blocks.causal_layers_path)) == 4
    assert all(torch.equal(mine, its) for mine, its in zip(ours, outputs, strict=True))
    real = a_batch()[1].bool()
    tolerance = 2e-6 if dtype == torch.float32 else 0.02 if family in ROUNDS else 0
    found = streamed_logits(decoder, ours[-1])
    torch.testing.assert_close(found[real], logits[real].float(), rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mistral", {"sliding_window": 64}),
        ("phi3", {"sliding_window": 64}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma3_text", {"sliding_window": 64}),
        ("gemma3_text", {"final_logit_softcapping": None}),
        ("cohere", {"logit_scale": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"embedding_multiplier": 1.0}),
        ("granite", {"attention_multiplier": 1.0}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_a_family_does_of_its_own_would_be_missed(family: str, change: dict[str, Any], tmp_path: Path) -> None:
    """The same weights without it give other logits, by a thousand times the tolerance: so it is there in ours."""
    decoder = a_decoder(family, family in TIED, tmp_path / "model")
    _, logits = layer_outputs(decoder)
    shutil.copytree(tmp_path / "model", tmp_path / "changed")
    config = tmp_path / "changed" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    changed = opened(tmp_path / "changed")
    found, real = streamed_logits(changed, streamed(changed.blocks)[-1]), a_batch()[1].bool()
    assert (found - logits)[real].abs().max() > 2e-3
    if "sliding_window" in change:  # only what lies farther back than the window
        torch.testing.assert_close(found[:, :4][real[:, :4]], logits[:, :4][real[:, :4]], rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("original", [16, 4], ids=["short texts", "long texts"])
def test_frequencies_for_long_texts_are_streamed(original: int, tmp_path: Path) -> None:
    """Phi-3's models of 128,000 tokens have two sets of factors: texts here are shorter than the first is for, or longer."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}
    sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": original}
    tiny_causal_model("phi3", tied=False, rope_parameters=rope, **sizes).save_pretrained(tmp_path)
    decoder = opened(tmp_path)
    outputs, logits = layer_outputs(decoder)
    ours, real = streamed(decoder.blocks), a_batch()[1].bool()
    assert all(torch.equal(mine, its) for mine, its in zip(ours, outputs, strict=True))
    torch.testing.assert_close(streamed_logits(decoder, ours[-1])[real], logits[real], rtol=0, atol=2e-6)
    assert memory_profile_of(decoder.blocks, 8, None).streamed_head


@pytest.mark.slow
def test_dynamic_frequencies_are_those_of_texts_within_the_models_positions(tmp_path: Path) -> None:
    """No job has longer ones. To a trace it is not to be seen how long a text is."""
    rope = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}
    tiny_causal_model("llama", tied=False, rope_parameters=rope, max_position_embeddings=9).save_pretrained(tmp_path)
    decoder = opened(tmp_path)
    outputs, logits = layer_outputs(decoder)
    ours, real = streamed(decoder.blocks), a_batch()[1].bool()
    assert all(torch.equal(mine, its) for mine, its in zip(ours, outputs, strict=True))
    torch.testing.assert_close(streamed_logits(decoder, ours[-1])[real], logits[real], rtol=0, atol=2e-6)
    assert decoder.blocks.positions == 9
    assert trace_memory(Parts(decoder.blocks, None, 1).head, decoder.blocks.hidden_size, torch.float32).forward


def test_a_bias_that_is_left_out_would_be_missed(tmp_path: Path) -> None:
    decoder = a_decoder("phi", False, tmp_path)
    _, logits = layer_outputs(decoder)
    decoder.model.lm_head.bias.zero_()
    assert (layer_outputs(decoder)[1] - logits).abs().max() > 1e-2


def theirs(decoder: Decoder, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Hugging Face's own loss of each example alone, without padding, summed; and its gradient at the last layer's output."""
    ids, _ = a_batch()
    last_layer = decoder.model.base_model.get_submodule(decoder.blocks.layers_path)[-1]
    total, gradients = torch.zeros(()), []
    for row, length in enumerate(LENGTHS):
        outputs: list[Tensor] = []

        def keep(_: object, __: object, output: Tensor | tuple[Tensor], kept: list[Tensor] = outputs) -> None:
            kept.append((output[0] if isinstance(output, tuple) else output).requires_grad_())

        hook = last_layer.register_forward_hook(keep)
        alone = ids[row : row + 1, :length]
        labels = torch.where(targets[row : row + 1, :length], alone, -100)
        loss = decoder.model(input_ids=alone, labels=labels, use_cache=False).loss
        hook.remove()
        counts = bool((labels[:, 1:] != -100).any())
        total = total + (loss.detach() if counts else 0)
        gradients.append(torch.autograd.grad(loss, outputs[0])[0][0] if counts else torch.zeros_like(outputs[0][0]))
    return total, gradients


def ours(decoder: Decoder, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the padded batch, the head streamed."""
    ids, mask = a_batch()
    hidden, reader = streamed(decoder.blocks)[-1].requires_grad_(), a_reader(decoder)
    loss = next_token_loss(decoder.blocks, hidden, ids.numpy(), mask, targets.numpy(), reader)
    (gradient,) = torch.autograd.grad(loss, hidden)
    reader.close()
    return loss.detach(), gradient


@pytest.mark.slow
@pytest.mark.parametrize("part", ["all", "responses"])
@every_decoder
def test_the_loss_is_that_of_the_hugging_face_model(family: str, tied: bool, part: str, tmp_path: Path) -> None:
    """In value and in gradient, for targets that are each token or the response's alone (labels of -100 elsewhere)."""
    decoder = a_decoder(family, tied, tmp_path)
    assert ("lm_head.weight" in Checkpoint(tmp_path).names) != tied
    targets = a_batch()[1].bool() if part == "all" else responses()
    (loss, gradient), (expected, wanted) = ours(decoder, targets), theirs(decoder, targets)
    torch.testing.assert_close(loss, expected)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(gradient[row, :length], wanted[row])
        assert not gradient[row, max(length - 1, 0) :].any(), "nothing follows the last token"


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "cohere", "granite"])
def test_the_loss_in_half_precision(family: str, tmp_path: Path) -> None:
    """Within what bfloat16 rounds: 1% of the loss, 3% of the gradient."""
    decoder = a_decoder(family, family in TIED, tmp_path, torch.bfloat16)
    (loss, gradient), (expected, wanted) = ours(decoder, responses()), theirs(decoder, responses())
    torch.testing.assert_close(loss, expected.float(), rtol=0.01, atol=0)
    for row, length in enumerate(LENGTHS):
        apart = (gradient[row, :length] - wanted[row]).float().norm()
        assert apart <= 0.03 * wanted[row].float().norm()


@pytest.mark.slow
@every_decoder
def test_the_scores_are_those_of_the_logits(family: str, tied: bool, tmp_path: Path) -> None:
    decoder, targets = a_decoder(family, tied, tmp_path), responses()
    ids, mask = a_batch()
    _, logits = layer_outputs(decoder)
    reader = a_reader(decoder)
    hidden = streamed(decoder.blocks)[-1]
    losses, right = next_token_scores(decoder.blocks, hidden, ids.numpy(), mask, targets.numpy(), reader)
    reader.close()
    for row in range(len(LENGTHS)):
        places = targets[row].nonzero().squeeze(1)
        before, wanted = logits[row, places - 1], ids[row, places]
        torch.testing.assert_close(losses[row].float(), cross_entropy(before, wanted, reduction="sum"))
        assert right[row] == (before.argmax(1) == wanted).sum()


@pytest.mark.parametrize(
    ("key", "value"),
    [("logit_scale", 0.5), ("logits_scaling", 2.0), ("lm_head_multiplier", 2.0), ("logits_soft_cap", 30.0)],
)
def test_a_form_of_logits_that_is_not_known_is_refused_by_name(key: str, value: float, tmp_path: Path) -> None:
    """Also a word that another family uses: here it may mean something else, or nothing."""
    folder = a_decoder("llama", True, tmp_path).folder
    AutoConfig.from_pretrained(folder, **{key: value}).save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(UnsupportedModel, match=f"its head has {key}, which is not supported"):
        assert Blocks(folder, torch.float32).logit_form


@pytest.mark.parametrize(
    ("config", "model", "name"),
    [(RobertaConfig, RobertaForCausalLM, "lm_head.dense.bias"), (BertConfig, BertLMHeadModel, "cls.predictions.bias")],
)
def test_a_head_with_layers_of_its_own_is_refused_by_name(config: Any, model: Any, name: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    model(config(vocab_size=64, is_decoder=True, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"its head has {name}, which is not supported"):
        assert Blocks(tmp_path, torch.float32).logit_form
