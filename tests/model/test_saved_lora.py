"""Promise: a finished stack of LoRAs is a plain LoRA, which PEFT loads and merges without this project."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import CorruptCommit
from chainfed_ray.export.handover import hand_over
from chainfed_ray.model.saved_stack import load_stack, save_stack
from tests.causal import a_lora_stack, byte_tokenizer, causal_folder, streamed_logits
from tests.models import a_lora_classifier, class_logits, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # and sets it
]
IDS = torch.arange(3, 23).reshape(2, 10)
MASK = torch.ones_like(IDS)
PLAIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

ids = torch.arange(3, 23).reshape(2, 10)
for folder in sys.argv[1:]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), f"{folder}/model")
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    torch.save((logits, merged), f"{folder}/logits")
assert not [name for name in sys.modules if name.startswith("chainfed")]
"""
DECODERS = ["llama", "gpt2", "qwen2"]


@pytest.fixture(params=DECODERS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return causal_folder(request.param, tmp_path / "base")


@pytest.mark.slow
def test_peft_gives_the_same_logits_without_this_project(tmp_path: Path) -> None:
    """For three families, in one process: it takes seconds to load PEFT."""
    saved = {}
    for family in DECODERS:
        folder = tmp_path / family
        saved[folder] = a_lora_stack(causal_folder(family, folder / "base"), (1,))
        save_stack(saved[folder], folder / "model")
    command = [sys.executable, "-c", PLAIN, *map(str, saved)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120)
    for folder, one in saved.items():
        logits, merged = torch.load(folder / "logits")
        expected = streamed_logits(folder / "base", one.stack, IDS, MASK)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
        bare = AutoModelForCausalLM.from_pretrained(folder / "base")(input_ids=IDS).logits
        assert (bare - expected).abs().max() > 0.01


def test_the_names_are_those_that_other_engines_read(tmp_path: Path) -> None:
    """What vLLM looks for: rank and modules in the configuration, and A [r, K] and B [N, r] by the module's path."""
    base = causal_folder("llama", tmp_path / "base")
    save_stack(a_lora_stack(base, (1,)), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 3, 6, "none")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert config["target_modules"] == sorted(modules)
    tensors = load_file(tmp_path / "model" / "adapter_model.safetensors")
    paths = {f"self_attn.{name}" if name[0] in "qkvo" else f"mlp.{name}" for name in modules[:4]}
    paths |= {f"mlp.{name}" for name in modules[4:]}
    before = "base_model.model.model.layers.1"
    assert set(tensors) == {f"{before}.{path}.lora_{part}.weight" for path in paths for part in "AB"}
    assert tensors[f"{before}.mlp.down_proj.lora_A.weight"].shape == (3, 64)
    assert tensors[f"{before}.mlp.down_proj.lora_B.weight"].shape == (32, 3)


def test_what_is_saved_is_loaded(base: Path, tmp_path: Path) -> None:
    saved = a_lora_stack(base)
    save_stack(saved, tmp_path / "model")
    found = load_stack(tmp_path / "model")
    assert (found.base, found.layers_path, found.max_length) == (saved.base, saved.layers_path, saved.max_length)
    tensors = saved.stack.tensors()
    assert found.stack.tensors().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.stack.tensors().items())


@pytest.mark.parametrize("spoilt", ["chainfed.json", "adapter_model.safetensors", "layers"])
def test_a_folder_that_is_not_whole_is_refused(spoilt: str, tmp_path: Path) -> None:
    save_stack(a_lora_stack(causal_folder("llama", tmp_path / "base")), tmp_path / "model")
    if spoilt == "layers":
        config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
        (tmp_path / "model" / "adapter_config.json").write_text(json.dumps(config | {"layers_to_transform": [0]}))
    else:
        (tmp_path / "model" / spoilt).unlink()
    with pytest.raises(CorruptCommit):
        load_stack(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["peft", "transformers"])
def test_it_is_handed_over_in_plain_forms(base: Path, form: str, tmp_path: Path) -> None:
    saved = a_lora_stack(base)
    save_stack(saved, tmp_path / "model")
    hand_over(tmp_path / "model", tmp_path / "out", form)
    assert "It does not need chainfed-ray" in (tmp_path / "out" / "README.md").read_text()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out" if form == "transformers" else base)
    if form == "peft":
        found = PeftModel.from_pretrained(found, tmp_path / "out")
    logits = found(input_ids=IDS).logits
    torch.testing.assert_close(logits, streamed_logits(base, saved.stack, IDS, MASK), rtol=1e-4, atol=1e-4)


def test_the_revision_of_a_base_model_is_part_of_it(tmp_path: Path) -> None:
    saved = replace(a_lora_stack(causal_folder("llama", tmp_path / "base")), base="hf:org/name@abc123")
    save_stack(saved, tmp_path / "model")
    hand_over(tmp_path / "model", tmp_path / "out", "peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "abc123")
    assert 'from_pretrained(base, revision="abc123")' in (tmp_path / "out" / "README.md").read_text()


def test_a_lora_of_elsewhere_is_told_from_a_broken_stack(tmp_path: Path) -> None:
    save_stack(a_lora_stack(causal_folder("llama", tmp_path / "base")), tmp_path / "model")
    (tmp_path / "model" / "chainfed.json").unlink()
    with pytest.raises(CorruptCommit, match=r"a LoRA without the chainfed.json"):
        load_stack(tmp_path / "model")


def test_the_round_of_a_job_that_trains_is_found(tmp_path: Path) -> None:
    saved, storage = a_lora_stack(causal_folder("llama", tmp_path / "base")), Storage.at(tmp_path / "data", None, None)
    save_stack(replace(saved, round=5), storage.job("job") / "last")
    assert storage.stack("job", 5) == storage.job("job") / "last"


@pytest.fixture(params=["bert", "roberta", "distilbert", "llama", "t5"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An encoder, a decoder that has a norm above its layers, and one with a decoder beside it."""
    folder = tiny(request.param, tmp_path / "base", vocabulary=260)
    byte_tokenizer(chat=False).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_classifier_is_a_plain_lora_with_its_head_beside_it(encoder: Path, tmp_path: Path) -> None:
    """The code of the card gives the service's answer, from PEFT and transformers alone."""
    saved = a_lora_classifier(encoder)
    save_stack(saved, tmp_path / "model")
    found = load_stack(tmp_path / "model")
    assert (found.classes, found.layers_path, found.max_length) == (saved.classes, saved.layers_path, saved.max_length)
    assert found.stack.head_layers == saved.stack.head_layers
    tensors = saved.stack.tensors()
    assert found.stack.tensors().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.stack.tensors().items())

    hand_over(tmp_path / "model", tmp_path / "out", "peft")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It does not need chainfed-ray" in card
    code = card.split("```python\n")[1].split("```")[0]
    assert "chainfed_ray" not in code
    told = dict[str, torch.Tensor]()
    exec(code.replace('FOLDER = "."', f"FOLDER = {str(tmp_path / 'out')!r}"), told)
    batch = AutoTokenizer.from_pretrained(encoder)(["A text."], return_tensors="pt")
    expected = class_logits(encoder, saved.stack, batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(told["logits"], expected, rtol=1e-4, atol=1e-4)
    bare = class_logits(encoder, saved.stack.up_to(-1), batch["input_ids"], batch["attention_mask"])
    assert (bare - expected).abs().max() > 0.01


@pytest.mark.slow
def test_a_classifier_s_loras_are_merged(encoder: Path, tmp_path: Path) -> None:
    """By PEFT, and in a folder for transformers, of which only the head is ours."""
    saved = a_lora_classifier(encoder)
    save_stack(saved, tmp_path / "model")
    hand_over(tmp_path / "model", tmp_path / "out", "transformers")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(logits, class_logits(encoder, saved.stack, IDS, MASK), rtol=1e-4, atol=1e-4)
    merged = PeftModel.from_pretrained(AutoModel.from_pretrained(encoder), tmp_path / "model").merge_and_unload()
    ours = model.base.state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
