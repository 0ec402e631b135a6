"""Promise: a language model's stack loads with PEFT on the causal model, and gives the logits of the streamed chain."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from chainfed_ray.errors import CorruptCommit
from chainfed_ray.model.saved_stack import load_stack, save_stack
from chainfed_ray.serving.peft_method import ChainFedLayer
from tests.causal import FAMILIES, a_causal_stack, causal_folder, streamed_logits
from tests.project import ROOT

# PEFT itself asks a model for it by this name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def loaded(folder: Path, saved: Path) -> PeftModel:
    """As a user has it."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(saved)).eval()


def a_batch() -> tuple[Tensor, Tensor]:
    """Three examples of unequal length, padded at the right."""
    mask = (torch.arange(9)[None, :] < torch.tensor([9, 4, 6])[:, None]).long()
    ids = torch.randint(3, 260, (3, 9), generator=torch.Generator().manual_seed(0))
    return ids * mask, mask


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return causal_folder(request.param, tmp_path / "base")


def test_loaded_by_peft_is_the_streamed_model(folder: Path, tmp_path: Path) -> None:
    saved = a_causal_stack(folder)
    save_stack(saved, tmp_path / "model")
    ids, mask = a_batch()
    expected = streamed_logits(folder, saved.stack, ids, mask)
    with torch.no_grad():
        found = loaded(folder, tmp_path / "model")(input_ids=ids, attention_mask=mask).logits
        bare = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=2e-5)
    assert (found[real] - bare[real]).abs().max() > 1e-2


def test_peft_generates_what_the_streamed_chain_holds_for_likeliest(folder: Path, tmp_path: Path) -> None:
    saved = a_causal_stack(folder)
    save_stack(saved, tmp_path / "model")
    ids, _ = a_batch()
    written = loaded(folder, tmp_path / "model").generate(input_ids=ids[:1], max_new_tokens=6, do_sample=False)
    for length in range(ids.shape[1], written.shape[1]):
        so_far = written[:, :length]
        logits = streamed_logits(folder, saved.stack, so_far, torch.ones_like(so_far))
        assert logits[0, -1].argmax() == written[0, length]


def test_saved_by_peft_is_what_we_save(folder: Path, tmp_path: Path) -> None:
    ours = a_causal_stack(folder, layers=(1,))
    save_stack(ours, tmp_path / "ours")
    model = loaded(folder, tmp_path / "ours")
    assert len([module for module in model.modules() if isinstance(module, ChainFedLayer)]) == 1
    model.save_pretrained(str(tmp_path / "theirs"))
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    for name in ("ours", "theirs"):
        again = load_stack(tmp_path / name)
        assert (again.config(), again.stack.head, again.layers_path) == (ours.config(), None, ours.layers_path)


def test_a_folder_says_what_its_stack_is_for(tmp_path: Path) -> None:
    folder = causal_folder("llama", tmp_path / "base")
    save_stack(a_causal_stack(folder), tmp_path / "model")
    path = tmp_path / "model" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert (config["task_type"], config["target_modules"]) == ("CAUSAL_LM", ["model.layers.0", "model.layers.1"])
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "task_type"}))
    with pytest.raises(CorruptCommit, match="its adapters are not those"):
        load_stack(tmp_path / "model")


@pytest.mark.slow
def test_the_documented_program_writes(tmp_path: Path) -> None:
    folder = causal_folder("llama", tmp_path / "base")
    saved = a_causal_stack(folder)
    save_stack(saved, tmp_path / "model")
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", (ROOT / "docs" / "models.md").read_text(), re.MULTILINE)
    program = next(dedent(block) for block in blocks if "AutoModelForCausalLM" in block)
    with redirect_stdout(io.StringIO()) as said:
        exec(program, {"BASE": folder, "FOLDER": str(tmp_path / "model")})
    assert said.getvalue().startswith("Soup: ")
    assert len(said.getvalue()) > len("Soup: \n")
