"""Promise: a saved stack loads with ``PeftModel.from_pretrained`` and gives the logits of the streamed model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from chainfed_ray.data.tokens import Examples
from chainfed_ray.errors import CorruptCommit, UnsupportedModel
from chainfed_ray.model.saved_stack import load_stack, save_stack
from chainfed_ray.record import VERSION
from chainfed_ray.serving.peft_method import ChainFedLayer, SequenceClassifier
from tests.models import FAMILIES, a_saved_stack, class_logits, tiny


def examples() -> Examples:
    """Five examples of unequal length."""
    generator = np.random.default_rng(0)
    lengths = np.array([3, 9, 1, 6, 4])
    ids = generator.integers(3, 128, lengths.sum()).astype(np.int32)
    return Examples(ids, np.concatenate([[0], lengths.cumsum()]), np.zeros(5, dtype=np.int64))


def loaded(folder: Path, saved: Path) -> PeftModel:
    return PeftModel.from_pretrained(SequenceClassifier.from_folder(folder), str(saved)).eval()


def ask(model: PeftModel, **options: object) -> torch.Tensor:
    batch = examples().batch(np.arange(5))
    with torch.no_grad():
        answer: torch.Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, **options)
    return answer


@pytest.fixture(params=[*FAMILIES, "deberta-v2", "t5", "bart", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny(request.param, tmp_path / "base")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return tiny("bert", tmp_path / "base")


@pytest.mark.slow
def test_loaded_by_peft_is_the_streamed_model(folder: Path, tmp_path: Path) -> None:
    saved = a_saved_stack(folder)
    save_stack(saved, tmp_path / "model")
    batch = examples().batch(np.arange(5))
    expected = class_logits(folder, saved.stack, batch.ids, batch.mask)
    torch.testing.assert_close(ask(loaded(folder, tmp_path / "model")), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_saved_by_peft_is_what_we_save(folder: Path, tmp_path: Path) -> None:
    save_stack(a_saved_stack(folder), tmp_path / "ours")
    loaded(folder, tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    again = load_stack(tmp_path / "theirs")
    assert again.config() == a_saved_stack(folder).config()


@pytest.mark.parametrize("family", ["albert", "xlnet"])
def test_layers_that_peft_cannot_tell_apart_are_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="PEFT cannot put adapters between its layers; the service can"):
        SequenceClassifier.from_folder(tiny(family, tmp_path))


def test_only_the_chain_has_adapters(bert: Path, tmp_path: Path) -> None:
    save_stack(a_saved_stack(bert, layers=(2, 3)), tmp_path / "model")
    model = loaded(bert, tmp_path / "model")
    found = [name for name, module in model.named_modules() if isinstance(module, ChainFedLayer)]
    assert [name.rpartition(".")[2] for name in found] == ["2", "3"]


@pytest.mark.slow
def test_several_stacks_each_with_classes_of_its_own(bert: Path, tmp_path: Path) -> None:
    save_stack(a_saved_stack(bert), tmp_path / "a")
    save_stack(a_saved_stack(bert, layers=(0, 3), classes=5, seed=1), tmp_path / "b")
    alone = {name: ask(loaded(bert, tmp_path / name)) for name in ("a", "b")}
    model = loaded(bert, tmp_path / "a")
    model.load_adapter(str(tmp_path / "b"), "b")
    assert torch.equal(ask(model), alone["a"])
    model.set_adapter("b")
    assert torch.equal(ask(model), alone["b"])


def test_a_batch_with_a_stack_for_each_row(bert: Path, tmp_path: Path) -> None:
    save_stack(a_saved_stack(bert), tmp_path / "a")
    save_stack(a_saved_stack(bert, layers=(0, 3), seed=1), tmp_path / "b")
    model = loaded(bert, tmp_path / "a")
    model.load_adapter(str(tmp_path / "b"), "b")
    names = ["default", "b", "b", "default", "b"]
    mixed = ask(model, adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], ask(model)[row], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="no adapter is called 'c'"):
        ask(model, adapter_names=["c"] * 5)


def test_a_stack_cannot_be_merged_and_without_one_there_are_no_logits(bert: Path, tmp_path: Path) -> None:
    save_stack(a_saved_stack(bert), tmp_path / "model")
    model = loaded(bert, tmp_path / "model")
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_adapter()
    with pytest.raises(RuntimeError, match="no stack is active"), model.disable_adapter():
        ask(model)


@pytest.mark.slow
def test_without_its_stack_the_base_model_is_as_before(bert: Path, tmp_path: Path) -> None:
    save_stack(a_saved_stack(bert), tmp_path / "model")
    model = loaded(bert, tmp_path / "model")
    modules = {name: type(module) for name, module in SequenceClassifier.from_folder(bert).named_modules()}
    assert {name: type(module) for name, module in model.unload().named_modules()} == modules


def test_saved_and_loaded_is_the_same_stack(bert: Path, tmp_path: Path) -> None:
    saved = a_saved_stack(bert)
    save_stack(saved, tmp_path / "model")
    save_stack(saved, tmp_path / "model")  # as after a kill between the model and its record
    again = load_stack(tmp_path / "model")
    assert again.config() == saved.config()
    assert all(torch.equal(tensor, again.stack.tensors()[name]) for name, tensor in saved.stack.tensors().items())


@pytest.mark.parametrize("lost", ["adapter", "tensor", "named", "folder"])
def test_no_adapter_is_lost_silently(bert: Path, tmp_path: Path, lost: str) -> None:
    model = tmp_path / "model"
    save_stack(a_saved_stack(bert), model)
    weights, config = model / "adapter_model.safetensors", model / "adapter_config.json"
    tensors = load_file(weights)
    if lost == "adapter":
        save_file({name: tensor for name, tensor in tensors.items() if ".2." not in name}, weights)
    elif lost == "tensor":
        save_file(dict(list(tensors.items())[1:]), weights)
    elif lost == "named":
        document = json.loads(config.read_text())
        config.write_text(json.dumps({**document, "target_modules": document["target_modules"][1:]}))
    else:
        weights.unlink()
    with pytest.raises(CorruptCommit):
        load_stack(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_layers": 2}, "its adapters are not those"),
        ({"version": VERSION + 1}, f"it has version {VERSION + 1}; this chainfed-ray reads versions 1 to {VERSION}"),
    ],
    ids=["head", "version"],
)
def test_a_configuration_of_another_head_or_version_is_refused(
    change: dict[str, int], words: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    save_stack(a_saved_stack(tiny_model_folder), tmp_path / "model")
    config = tmp_path / "model" / "adapter_config.json"
    said = json.loads(config.read_text())
    assert said["head_layers"] == load_stack(tmp_path / "model").stack.head_layers == 3
    config.write_text(json.dumps(said | {"version": 1}))  # of the version before, whose stacks are the same
    assert load_stack(tmp_path / "model").config() == said
    config.write_text(json.dumps(said | change))
    with pytest.raises(CorruptCommit, match=words):
        load_stack(tmp_path / "model")
