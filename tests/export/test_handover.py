"""Promise: a folder that is handed over gives the answers of the service, and there is a whole folder or none."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from chainfed_ray.errors import CorruptCommit, InvalidJob, PackageMissing, UnsupportedModel
from chainfed_ray.export import handover, onnx_folder
from chainfed_ray.export.handover import hand_over
from chainfed_ray.hub import resolve
from chainfed_ray.model.saved_stack import SavedStack, save_stack
from chainfed_ray.serving.classifier import Classifier
from chainfed_ray.serving.peft_method import SequenceClassifier
from tests.causal import a_causal_stack, byte_tokenizer, causal_folder, streamed_logits
from tests.models import a_lora_classifier, a_saved_stack, tiny
from tests.project import COMMAND, ROOT

# PEFT reads it from the model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TEXTS = ["salt tide wave", "a", "cloud star " * 20, "seed clay root worm in a longer text", "bird"]  # one is cut
FINISHED = {"version": 1, "status": "succeeded", "accuracy": 0.875, "loss": 0.41234567, "rounds": 3, "epsilon": 2.5}


@pytest.fixture
def classifier(tiny_model_folder: Path, tmp_path: Path) -> tuple[Path, SavedStack]:
    """A classifier's folder, beside the record of its job."""
    saved = a_saved_stack(tiny_model_folder)
    save_stack(saved, tmp_path / "job" / "model")
    (tmp_path / "job" / "finished.json").write_text(json.dumps(FINISHED))
    return tmp_path / "job" / "model", saved


@pytest.fixture
def expected(classifier: tuple[Path, SavedStack]) -> torch.Tensor:
    """The service's answers to ``TEXTS``, [5, C]."""
    return Classifier(classifier[1].base, torch.float32).probabilities(classifier[1], TEXTS)


@pytest.fixture
def writer(tmp_path: Path) -> tuple[Path, SavedStack, Path]:
    """A language model's folder, its stack, and its base model's folder."""
    base = causal_folder("llama", tmp_path / "base")
    save_stack(a_causal_stack(base), tmp_path / "model")
    return tmp_path / "model", a_causal_stack(base), base


def text_batch(folder: Path, texts: list[str], kind: str = "pt") -> Any:
    return AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors=kind)


def causal_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [3, 9] of texts of unequal length."""
    mask = (torch.arange(9) < torch.tensor([4, 9, 1]).unsqueeze(1)).long()
    ids = torch.randint(3, 260, mask.shape, generator=torch.Generator().manual_seed(0))
    return ids * mask, mask


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The front matter of a model card, and what follows it."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def run_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the code of a model card prints, with the folder that it leaves open."""
    code = card_of(folder)[1].split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(code.replace('FOLDER = "."', f"FOLDER = {str(folder)!r}"), {})
    return capsys.readouterr().out.strip()


@pytest.mark.slow
def test_a_classifier_in_peft_s_form(
    classifier: tuple[Path, SavedStack], expected: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, saved = classifier
    out = tmp_path / "new" / "out"
    assert hand_over(folder, out, "peft") == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    model = PeftModel.from_pretrained(SequenceClassifier.from_folder(resolve(saved.base)), str(out)).eval()
    words = AutoTokenizer.from_pretrained(resolve(saved.base))
    batch = words(TEXTS, padding=True, truncation=True, max_length=saved.max_length, return_tensors="pt")
    with torch.no_grad():
        found = model(batch["input_ids"], batch["attention_mask"]).softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    about, text = card_of(out)
    assert about["library_name"] == "peft"
    assert (about["base_model"], about["pipeline_tag"]) == ("tiny", "text-classification")
    assert all(f"- `{name}`" in text for name in saved.classes)
    assert "| accuracy | 0.875 |\n| loss | 0.4123 |\n| rounds | 3 |\n| ε (differential privacy) | 2.5 |" in text
    assert run_code(out, capsys) == answer_to_the_card(saved)


def answer_to_the_card(saved: SavedStack) -> str:
    """The class of the text that the code of a model card asks about."""
    (row,) = Classifier(saved.base, torch.float32).probabilities(saved, ["A text."])
    return saved.classes[int(row.argmax())]


@pytest.mark.slow
def test_a_classifier_as_a_transformers_folder(
    classifier: tuple[Path, SavedStack], expected: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, saved = classifier
    out = tmp_path / "out"
    assert "model.safetensors" in hand_over(folder, out, "transformers")
    model, found = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(found.values()), "every weight has its place"
    batch = text_batch(out, TEXTS)
    with torch.no_grad():
        logits = model(**batch).logits
        alone = model(text_batch(out, TEXTS[:1])["input_ids"]).logits
    torch.testing.assert_close(logits.softmax(-1), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone.softmax(-1), expected[:1], rtol=0, atol=1e-6)
    said = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(out))(
        TEXTS, truncation=True, batch_size=3
    )
    assert [row["label"] for row in said] == [saved.classes[index] for index in expected.argmax(-1)]
    for name in ("config.json", "README.md"):
        assert str(resolve(saved.base).parent) not in (out / name).read_text(), "a path of this machine"
    assert run_code(out, capsys) == answer_to_the_card(saved)


@pytest.mark.slow
def test_a_language_model_as_a_transformers_folder(
    writer: tuple[Path, SavedStack, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, saved, base = writer
    out = tmp_path / "out"
    assert "generation_config.json" in hand_over(folder, out, "transformers")
    ids, mask = causal_batch()
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
    wanted = streamed_logits(base, saved.stack, ids, mask)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=0, atol=1e-6)

    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    options = {"max_new_tokens": 12, "do_sample": False}
    texts = [loaded.generate(input_ids=ids[1:2], **options) for loaded in (model, beside)]
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], model.base.generate(ids[1:2], max_new_tokens=3, do_sample=False))
    written = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(out))("Once", **options)
    assert written[0]["generated_text"].startswith("Once")
    assert card_of(out)[0]["pipeline_tag"] == "text-generation"
    assert run_code(out, capsys)


@pytest.mark.slow
def test_a_language_model_in_peft_s_form(
    writer: tuple[Path, SavedStack, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, saved, base = writer
    hand_over(folder, tmp_path / "out", "peft")
    ids, mask = causal_batch()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
    wanted = streamed_logits(base, saved.stack, ids, mask)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=0, atol=1e-6)
    assert "Results" not in card_of(tmp_path / "out")[1], "there is no record of its job"
    assert run_code(tmp_path / "out", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["distilbert", "deberta-v2", "t5", "gpt2", "mixtral"])
def test_families_as_a_transformers_folder(family: str, tmp_path: Path) -> None:
    base = tiny(family, tmp_path / "base", vocabulary=260)
    byte_tokenizer(chat=False).save_pretrained(base)
    saved = a_saved_stack(base)
    save_stack(saved, tmp_path / "model")
    hand_over(tmp_path / "model", tmp_path / "out", "transformers")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = model(**text_batch(tmp_path / "out", TEXTS)).logits.softmax(-1)
    wanted = Classifier(saved.base, torch.float32).probabilities(saved, TEXTS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_weights_keep_their_dtype_and_adapters_theirs(tiny_model_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModel.from_pretrained(tiny_model_folder).to(torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(base)
    saved = a_saved_stack(base)
    save_stack(saved, tmp_path / "model")
    hand_over(tmp_path / "model", tmp_path / "out", "transformers")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.split(".")[0]: tensor.dtype for name, tensor in tensors.items()} == {
        "base": torch.bfloat16,
        "stack": torch.float32,
    }
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (model.base.dtype, model.stack.head.linear.weight.dtype) == (torch.bfloat16, torch.float32)
    exact = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = exact(**text_batch(tmp_path / "out", TEXTS)).logits.softmax(-1)
    wanted = Classifier(saved.base, torch.float32).probabilities(saved, TEXTS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("made", [a_saved_stack, a_lora_classifier], ids=["bottleneck", "lora"])
def test_a_classifier_as_an_onnx_graph(
    made: Callable[[Path], SavedStack], tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    saved, out = made(tiny_model_folder), tmp_path / "out"
    save_stack(saved, tmp_path / "model")
    expected = Classifier(saved.base, torch.float32).probabilities(saved, TEXTS)
    assert {"model.onnx", "labels.json", "tokenizer.json"} <= set(hand_over(tmp_path / "model", out, "onnx"))
    assert json.loads((out / "labels.json").read_text()) == list(saved.classes)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    for rows in ([0, 1, 2, 3, 4], [2], [1], [0, 4, 3]):
        batch = text_batch(out, [TEXTS[row] for row in rows], "np")
        (logits,) = session.run(["logits"], {name: batch[name] for name in ("input_ids", "attention_mask")})
        found = torch.from_numpy(logits).softmax(-1)
        torch.testing.assert_close(found, expected[rows], rtol=0, atol=1e-4)
    assert run_code(out, capsys) == answer_to_the_card(saved)


class WrongSession:
    """A graph that takes all classes for equally likely."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def run(self, _names: object, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [np.zeros((len(given["input_ids"]), 3), dtype=np.float32)]


def test_a_graph_with_other_answers_is_refused(
    classifier: tuple[Path, SavedStack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: None)  # which takes ten seconds
    monkeypatch.setattr("onnxruntime.InferenceSession", WrongSession)
    with pytest.raises(UnsupportedModel, match="its ONNX graph gives probabilities that are"):
        hand_over(classifier[0], tmp_path / "out", "onnx")
    assert not list(tmp_path.glob("out*"))


def test_a_graph_without_its_packages_says_how_to_get_them(
    classifier: tuple[Path, SavedStack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_folder, "find_spec", lambda name: None)
    with pytest.raises(PackageMissing, match=r"the format onnx needs onnx,.*pip install 'chainfed-ray\[onnx\]'"):
        hand_over(classifier[0], tmp_path / "out", "onnx")
    assert not list(tmp_path.glob("out*"))


def test_a_graph_of_a_language_model_is_refused(writer: tuple[Path, SavedStack, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match="format is 'onnx'; expected peft or transformers, because this is a language"):
        hand_over(writer[0], tmp_path / "out", "onnx")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", ["transformers", "onnx"])
def test_layers_that_are_one_module_are_refused(form: str, tmp_path: Path) -> None:
    base = tiny("albert", tmp_path / "base", vocabulary=260)
    save_stack(a_saved_stack(base), tmp_path / "model")
    with pytest.raises(UnsupportedModel, match="cannot be hooked one by one"):
        hand_over(tmp_path / "model", tmp_path / "out", form)
    assert not list(tmp_path.glob("out*"))


def test_what_cannot_be_handed_over_ends_in_words(classifier: tuple[Path, SavedStack], tmp_path: Path) -> None:
    folder, _ = classifier
    with pytest.raises(InvalidJob, match="format is 'gguf'; expected peft, transformers or onnx"):
        hand_over(folder, tmp_path / "out", "gguf")
    for other in (folder.parent, tmp_path / "nowhere"):
        with pytest.raises(InvalidJob, match=r"folder is '.*'; expected the folder of a finished model, such as"):
            hand_over(other, tmp_path / "out", "peft")
    (tmp_path / "file").touch()
    for taken in (folder, tmp_path / "file"):
        with pytest.raises(
            InvalidJob, match=r"out is '.*'; expected a folder that does not exist yet, or an empty one"
        ):
            hand_over(folder, taken, "peft")
    (folder.parent / "finished.json").write_text("[")
    with pytest.raises(CorruptCommit, match=r"finished\.json: it is no record of a job"):
        hand_over(folder, tmp_path / "out", "peft")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", ["peft", "transformers"])
def test_an_empty_folder_is_filled(
    classifier: tuple[Path, SavedStack], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    files = hand_over(classifier[0], Path(), form)
    assert "README.md" in files
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_a_stack_that_its_job_left_beside_its_model_has_no_scores(tmp_path: Path, tiny_model_folder: Path) -> None:
    save_stack(a_saved_stack(tiny_model_folder), tmp_path / "last")
    (tmp_path / "finished.json").write_text(json.dumps(FINISHED))
    hand_over(tmp_path / "last", tmp_path / "out", "peft")
    assert "Results" not in card_of(tmp_path / "out")[1]


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_nothing_and_can_be_repeated(
    classifier: tuple[Path, SavedStack], tmp_path: Path
) -> None:
    """It is killed when the weights are written and the tokenizer is not."""
    folder, _ = classifier
    code = dedent(f"""
        import os, signal
        from pathlib import Path
        from transformers import PreTrainedTokenizerBase
        from chainfed_ray.export.handover import hand_over

        PreTrainedTokenizerBase.save_pretrained = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        hand_over(Path({str(folder)!r}), Path({str(tmp_path / "out")!r}), "transformers")
        """)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "model.safetensors").exists()
    (tmp_path / "out.partial" / "of the one that was killed").touch()
    assert "of the one that was killed" not in hand_over(folder, tmp_path / "out", "transformers")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_is_named_and_nothing_is_left(
    classifier: tuple[Path, SavedStack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(_: SavedStack, folder: Path) -> None:
        folder.mkdir()
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(handover, "_writer", lambda form: write)
    with pytest.raises(OSError, match="No space left on device") as refused:
        hand_over(classifier[0], tmp_path / "out", "transformers")
    assert (refused.value.errno, refused.value.filename) == (ENOSPC, str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_the_command(classifier: tuple[Path, SavedStack], tmp_path: Path) -> None:
    command = [*COMMAND, "export", str(classifier[0]), str(tmp_path / "out"), "--format", "transformers", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "WARNING" not in done.stderr
    assert (said["status"], said["format"], said["folder"]) == ("exported", "transformers", str(tmp_path / "out"))
    assert said["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (again.returncode, json.loads(again.stdout)["error"]["type"]) == (2, "InvalidJob")
    assert "error: out is" in again.stderr
