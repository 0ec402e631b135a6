"""Promise: a model streamed layer by layer is the whole Hugging Face model, exactly."""

import gc
import json
import shutil
import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.streaming.matrices import SLICE_BYTES
from tests.models import ENCODERS, FAMILIES, MIXTURES, tiny, tiny_causal_model, whole_outputs

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


def test_the_memory_of_a_layer_is_given_back_when_it_is_dropped(tiny_model_folder: Path) -> None:
    """At once, and not when Python next looks for garbage: a turn was planned for so many layers."""
    with closing(Blocks(tiny_model_folder, torch.float32)) as blocks:
        gc.collect()
        gc.disable()
        try:
            weights = [weakref.ref(weight) for weight in blocks.load_layer(1).parameters()]
            assert not [weight for weight in weights if weight() is not None]
        finally:
            gc.enable()


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("family", "width"), [("bert", "intermediate_size"), ("gpt2", "n_inner"), ("mixtral", "intermediate_size")]
)
def test_matrices_of_several_slices_give_the_same_bits_streamed_and_resident(
    family: str, width: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """In the backward pass as well, which adds up a product over the slices: in one sum it has other bits."""
    folder, (ids, mask) = tiny(family, tmp_path, layers=1, **{width: 40_000}), a_batch()
    found = []
    with closing(Blocks(folder, dtype)) as blocks, closing(blocks.reader()) as reader:
        for layer in (blocks.load_layer(0), blocks.load_layer(0, reader)):
            hidden, calls = blocks.embed(ids, mask)
            output = blocks.run(layer, hidden.requires_grad_(), calls[0])
            output.backward(torch.ones_like(output).cumsum(1))
            assert hidden.grad is not None
            found.append((output.detach(), hidden.grad))
    assert blocks.layer_bytes > SLICE_BYTES
    for resident, streamed in zip(*found, strict=True):
        assert torch.equal(resident, streamed)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_checkpoint_with_a_head_is_read_by_its_prefix(tmp_path: Path) -> None:
    bare = tiny("roberta", tmp_path / "bare")
    with_head = AutoModelForSequenceClassification.from_pretrained(bare)
    with_head.save_pretrained(tmp_path / "headed")
    assert torch.equal(
        streamed(Blocks(tmp_path / "headed", torch.float32))[-1], streamed(Blocks(bare, torch.float32))[-1]
    )


@pytest.mark.slow
def test_tensors_that_the_model_has_no_place_for_are_said_once_unless_they_are_ordinary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = tiny("bert", tmp_path / "bare")
    for kind, folder in ((AutoModelForMaskedLM, "tokens"), (AutoModelForSequenceClassification, "classes")):
        kind.from_pretrained(bare).save_pretrained(tmp_path / folder)
    for folder, said in (
        (bare, []),
        (tmp_path / "tokens", []),
        (
            tmp_path / "classes",
            ["the folder has 2 tensors that this model has no place for: classifier.bias, classifier.weight"],
        ),
    ):
        for _ in range(2):
            with closing(Blocks(folder, torch.float32)) as blocks:
                blocks.check()
        assert [record.getMessage() for record in caplog.records if record.name.startswith("chainfed_ray")] == said
        caplog.clear()


def test_an_adapter_in_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tiny("bert", tmp_path) / "model.safetensors"
    adapter = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
    save_file({**load_file(path), adapter: torch.zeros(2, 32)}, path, {"format": "pt"})
    words = r"tensors of an adapter, such as .*query\.lora_A\.weight: merge it into the base first"
    with closing(Blocks(tmp_path, torch.float32)) as blocks, pytest.raises(UnsupportedModel, match=words):
        blocks.check()


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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_a_model_without_its_pooler_is_finished_all_the_same(family: str, tmp_path: Path) -> None:
    """Checkpoints of masked language models have none. Nothing is computed with it."""
    ids, mask = a_batch()
    hidden = torch.randn(*ids.shape, 32)
    whole = Blocks(tiny(family, tmp_path / "whole"), torch.float32).finish(hidden, mask)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    folder = tiny(family, tmp_path / "without")
    save_file({name: it for name, it in tensors.items() if "pooler" not in name}, folder / "model.safetensors")
    blocks = Blocks(folder, torch.float32)
    blocks.check()
    assert torch.equal(blocks.finish(hidden, mask), whole)


@pytest.mark.parametrize(
    "said",
    [
        {"return_dict": False},
        {"pad_token_id": -1},
        {"chunk_size_feed_forward": 2},
        {"time_step_limit": [0.0, {"__float__": "Infinity"}]},
    ],
    ids=lambda said: next(iter(said)),
)
def test_what_a_configuration_says_besides_changes_no_number(said: dict[str, Any], tmp_path: Path) -> None:
    """Models have tuples for answers, -1 where there is no padding token, and texts cut in two: here of nine tokens.

    An infinite number may be a limit that there is not.
    """
    plain, other = tiny("bert", tmp_path / "plain", layers=1), tmp_path / "other"
    shutil.copytree(plain, other)
    config = other / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | said))
    (ids, mask), found = a_batch(), list[Tensor]()
    for folder in (plain, other):
        blocks = Blocks(folder, torch.float32)
        blocks.check()
        hidden, (call,) = blocks.embed(ids, mask)
        found.append(blocks.finish(blocks.run(blocks.load_layer(0), hidden, call), mask))
    assert torch.equal(*found)


NORM, UP, HEAD = "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (
            {},
            {"num_hidden_layers": 20_000},
            "its configuration has 20000 for num_hidden_layers, and its checkpoint 21 tensors",
        ),
        ({}, {"vocab_size": 10**12}, r"\[1000000000000, 32\] for embed_tokens.weight, and its checkpoint \[128, 32\]"),
        (
            {},
            {"max_position_embeddings": 10**12, "model_type": "bert"},
            "its configuration asks for 8000000000000 bytes of numbers; at most 16777216 are made",
        ),
        ({}, {"rms_norm_eps": float("nan")}, "its config.json is no JSON .it has NaN"),
        (
            {},
            {"num_hidden_layers": "two"},
            "its config.json cannot be used .*'num_hidden_layers' expected int, got str",
        ),
        ({}, {"rms_norm_eps": float("inf")}, "its config.json has inf for rms_norm_eps; expected a finite number"),
        ({}, {"rms_norm_eps": -1e-5}, "its config.json has -1e-05 for rms_norm_eps; expected a number above 0"),
        ({}, {"rms_norm_eps": 0.0}, "its config.json has 0.0 for rms_norm_eps; expected a number above 0"),
        ({}, {"rms_norm_eps": 1}, "its config.json cannot be used .*'rms_norm_eps' expected float, got int"),
        ({}, {"initializer_range": {"__float__": "NaN"}}, "has nan for initializer_range; expected a finite number"),
        ({}, {"attention_dropout": 2}, "its config.json has 2 for attention_dropout; expected a number from 0 to 1"),
        ({}, {"num_attention_heads": -1}, "its config.json has -1 for num_attention_heads; expected at least 1"),
        ({}, {"num_attention_heads": 4.0}, "its config.json cannot be used .*'num_attention_heads' expected int, got"),
        ({}, {"num_attention_heads": True}, "its config.json cannot be used .*'num_attention_heads' expected int, got"),
        ({}, {"hidden_size": 0}, "its config.json has 0 for hidden_size; expected at least 1"),
        ({}, {"hidden_act": "nope"}, "its config.json has 'nope' for hidden_act, which transformers does not know"),
        (
            {},
            {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
            "has 'nope' for rope_parameters.rope_type, which transformers does not know",
        ),
        (
            {},
            {"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 1e4}},
            "its config.json has 0 for rope_parameters.factor; expected a number above 0",
        ),
        ({NORM: None}, {}, "cannot be run after its last layer; norm.weight is missing"),
        ({NORM: torch.ones(16)}, {}, r"its configuration has \[32\] for norm.weight, and its checkpoint \[16\]"),
        ({UP: torch.zeros(64, 32, dtype=torch.int8)}, {}, "its checkpoint has layers.1.mlp.up_proj.weight as int8"),
        ({UP: torch.full((64, 32), 1e300, dtype=torch.float64)}, {}, f"{UP} has weights that are no numbers"),
        ({HEAD: torch.full((128, 32), torch.inf)}, {}, f"{HEAD} has weights that are no numbers"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused_by_what_it_is(
    change: dict[str, Tensor | None], config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    tiny_causal_model("llama", tied=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | change
    save_file({name: it for name, it in tensors.items() if it is not None}, tmp_path / "model.safetensors")
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | config))
    with pytest.raises(UnsupportedModel, match=reason):
        Blocks(tmp_path, torch.float32).check()
