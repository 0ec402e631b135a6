"""Promise: `model.quantization: nf4` makes a folder of a plain one, once, whose layers' matrices bitsandbytes has quantized."""

import json
import os
import shutil
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from chainfed_ray.device.memory_limit import memory_limit
from chainfed_ray.errors import InvalidJob
from chainfed_ray.hub import digest_of
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.source import load_whole, weights_folder
from chainfed_ray.streaming import nf4_folder
from chainfed_ray.streaming.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for converted models that is empty at first."""
    monkeypatch.setenv("CHAINFED_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def in_nf4(folder: Path) -> Path:
    return weights_folder(f"path:{folder}#nf4")


def a_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A small model whose rows have 64 or 128 weights, in two shards."""
    config = AutoConfig.for_model(family, **_SMALL[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = AutoModelForCausalLM if family in ("llama", "mixtral") else AutoModel
        kind.from_config(config).to(dtype).save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


_SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
_SMALL: dict[str, dict[str, Any]] = {
    "llama": dict(_SIZES, intermediate_size=128),
    "mixtral": dict(_SIZES, intermediate_size=128, num_local_experts=2),
    "bert": dict(_SIZES, intermediate_size=128),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("mixtral", "float32"), ("bert", "float32")]
)
def test_matrices_of_layers_become_what_bitsandbytes_makes_of_them(family: str, dtype: str, tmp_path: Path) -> None:
    """The others stay as they are, and what computes with the model computes with those values."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    folder = a_folder(tmp_path / "model", family, getattr(torch, dtype))
    made = in_nf4(folder)
    plain, quantized = Checkpoint(folder), Checkpoint(made)
    assert quantized.names == plain.names
    expected = {name: plain.read(name, torch.float32) for name in plain.names}
    for name, values in expected.items():
        is_matrix = values.dim() > 1 and (".0." in name or ".1." in name) and ".gate." not in name
        assert quantized.form(name) == ("NF4" if is_matrix else None), name
        if is_matrix:
            expected[name] = dequantize_4bit(*quantize_4bit(values, blocksize=64, quant_type="nf4"))
            assert not torch.equal(expected[name], values)
            assert quantized.stored_bytes(name) * 8 == values.numel() * 4.5
        assert torch.equal(quantized.read(name, torch.float32), expected[name])
    plain.close()
    quantized.close()

    save_file(expected, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    values_of, blocks = Blocks(tmp_path, torch.float32), Blocks(made, torch.float32)
    blocks.check()
    reader = blocks.reader()
    hidden, calls = blocks.embed(torch.randint(3, 90, (2, 9)), torch.ones(2, 9, dtype=torch.long))
    for index, call in enumerate(calls):
        after = values_of.run(values_of.load_layer(index), hidden, call)
        assert torch.equal(blocks.run(blocks.load_layer(index), hidden, call), after)
        torch.testing.assert_close(blocks.run(blocks.load_layer(index, reader), hidden, call), after)
        hidden = after
    for closed in (reader, blocks, values_of):
        closed.close()


def test_a_model_is_quantized_once_and_anew_when_any_file_of_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other checkpoints beside it are no part of it, and neither are pickles."""
    folder = a_folder(tmp_path / ("a-model-of-a-long-name" * 11), "llama")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    first = in_nf4(folder)
    assert sorted(path.name for path in first.iterdir()) == [
        "config.json", "generation_config.json", "model-00001.safetensors", "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    assert digest_of(first) != digest_of(folder)
    for other in ("adapter_model.safetensors", "consolidated.safetensors"):
        save_file({"other.0.weight": torch.ones(64, 64)}, folder / other)
    monkeypatch.setattr(nf4_folder, "find_spec", lambda name: None)  # the package is not needed for what is there
    assert in_nf4(folder) == first
    monkeypatch.undo()
    monkeypatch.setenv("CHAINFED_MODELS", str(first.parent))
    made = {first}
    for name in ("tokenizer.json", "model.safetensors.index.json", min(folder.glob("model-*.safetensors")).name):
        os.utime(folder / name, (1, 1))
        made.add(in_nf4(folder))
    assert len(made) == 4
    with_others = Checkpoint(max(made))
    assert not [name for name in with_others.names if name.startswith("other")]
    with_others.close()


def test_a_conversion_that_was_killed_goes_on_with_the_shards_that_are_there(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_folder(tmp_path / "model", "llama")
    whole = load_whole(AutoModelForCausalLM, in_nf4(folder)).state_dict()
    monkeypatch.setenv("CHAINFED_MODELS", str(tmp_path / "others"))
    monkeypatch.setattr(nf4_folder, "SHARD_BYTES", 10_000)
    rename, written = Path.rename, list[str]()

    def killed_at_the_third(path: Path, to: Path) -> Any:
        if path.suffix == ".partial":
            written.append(to.name)
            if len(written) == 3:
                raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        in_nf4(folder)
    made = in_nf4(folder)
    assert len(written) > 4
    assert len(written) == len(list(made.glob("*.safetensors"))) + 1, "only the third is written twice"
    assert not list(made.glob("*.partial"))
    found = load_whole(AutoModelForCausalLM, made).state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())


def a_layer(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A folder with these tensors, whatever model has them."""
    AutoConfig.for_model("llama", **_SMALL["llama"]).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.slow
def test_a_conversion_takes_little_memory_however_large_a_tensor_is(tmp_path: Path) -> None:
    """The check of a job has a limit, and the mapping of a file counts against it."""
    import bitsandbytes  # noqa: F401  its import takes memory too

    in_nf4(a_layer(tmp_path / "first", {"layers.0.w.weight": torch.ones(64, 64)}))  # the libraries are warm
    shape, rest = [16, 1024, 512], 2**27
    size = 16 * 1024 * 512 * 2
    header = json.dumps({
        "layers.0.mlp.experts.down_proj": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]},
        "embed.weight": {"dtype": "BF16", "shape": [rest // 64, 32], "data_offsets": [size, size + rest]},
    }).encode()  # fmt: skip
    folder = a_layer(tmp_path / "model", {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size + rest)  # sparse
    with memory_limit(64 * 2**20):
        made = in_nf4(folder)
    sizes = sorted(path.stat().st_size for path in made.glob("*.safetensors"))
    assert [round(each / 2**20, 1) for each in sizes] == [4.5, 128.0]


def test_what_chooses_experts_and_other_dtypes_stay_as_they_are(tmp_path: Path) -> None:
    stay = [
        "gate", "router", "moe_router", "router.layer", "mlp.gate.wg", "router.classifier", "relative_attention_bias",
        "attn.weights_proj", "input_layernorm",
    ]  # fmt: skip
    quantized = ["gate_proj", "self_attn.q_proj", "experts.7.w1"]
    tensors = {f"layers.3.{name}.weight": torch.randn(64, 128) for name in (*stay, *quantized)}
    tensors |= {
        "layers.3.codes.weight": torch.ones(64, 64, dtype=torch.int8),
        "layers.3.flags.weight": torch.ones(3) > 0,
    }
    tensors |= {"layers.3.none.weight": torch.ones(64, 0), "layers.3.one.weight": torch.tensor(1.5).half()}
    made = Checkpoint(in_nf4(a_layer(tmp_path / "model", tensors)))
    forms = {name for name in made.names if made.form(name)}
    assert forms == {f"layers.3.{name}.weight" for name in quantized}
    assert made.names == tensors.keys()
    for name in made.names - forms:
        assert made.dtype(name) == tensors[name].dtype
        assert torch.equal(made.read(name, tensors[name].dtype), tensors[name])
    for file in made.folder.glob("*.safetensors"):
        load_file(file)  # safetensors' own reader takes it
    made.close()


def narrow(folder: Path) -> None:
    a_layer(folder, {"layers.0.a.weight": torch.ones(64, 96), "layers.0.b.weight": torch.ones(32, 64)})


def in_fp8(folder: Path) -> None:
    a_layer(folder, {"layers.0.a.weight": torch.ones(64, 64).to(torch.float8_e4m3fn)})


def quantized_before(folder: Path) -> None:
    shutil.copytree(in_nf4(a_layer(folder.with_name("plain"), {"layers.0.a.weight": torch.ones(64, 64)})), folder)


def without_a_shard(folder: Path) -> None:
    a_folder(folder, "llama")
    max(folder.glob("*.safetensors")).unlink()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (narrow, r"a model that can be quantized \(no matrix of its layers has 64 rows"),
        (in_fp8, r"a model that can be streamed \(model.safetensors has layers.0.a.weight in the dtype F8_E4M3, which"),
        (quantized_before, r"a model that can be streamed \(its matrices are quantized already \(NF4\)\)"),
        (without_a_shard, r"a model that can be streamed \(model-0.* is missing\)"),
    ],
)
def test_what_cannot_be_quantized_is_refused_by_its_field_and_nothing_is_left_of_it(
    make: Callable[[Path], None], reason: str, tmp_path: Path, cache: Path
) -> None:
    make(tmp_path / "model")
    before = set(cache.iterdir()) if cache.exists() else set()
    with pytest.raises(InvalidJob, match=rf"model\.base is 'path:.*model'; expected {reason}"):
        in_nf4(tmp_path / "model")
    assert (set(cache.iterdir()) if cache.exists() else set()) == before


def test_what_is_not_installed_is_said_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_folder, "find_spec", lambda name: None)
    with pytest.raises(InvalidJob, match=r"model\.quantization is 'nf4'.*pip install 'chainfed-ray\[nf4\]'"):
        in_nf4(a_layer(tmp_path / "model", {"layers.0.a.weight": torch.ones(64, 64)}))


def test_trouble_of_the_disk_is_not_the_models_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised as such, so a service waits for the disk, or says that it failed, and does not refuse the job."""
    folder = a_layer(tmp_path / "model", {"layers.0.a.weight": torch.ones(64, 64)})
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CHAINFED_MODELS", str(folder / "config.json" / "models"))
        with pytest.raises(NotADirectoryError):
            in_nf4(folder)

    def full(_: int) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        in_nf4(folder)
