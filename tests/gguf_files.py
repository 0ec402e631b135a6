"""Writes small GGUF files with random weights, of any architecture of which transformers reads GGUF files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

Change = Callable[[gguf.GGUFWriter], None]
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_ctx": 64, "n_positions": 1024},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "qwen3_moe": _SIZES | {"num_experts": 4, "num_experts_per_tok": 2},
}
_NAMES = {"qwen3_moe": "qwen3moe"}  # of architectures, where GGUF's are not transformers'


def a_gguf(
    path: Path, form: str, family: str = "llama", ups: str | None = None, change: Change | None = None, **sizes: Any
) -> Path:
    """A small model of ``family`` with random matrices of the ``form``, and a tokenizer of bytes.

    ``ups`` is the form of the experts' ups, if it is another. ``change`` alters what is written.
    """
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    tokens = ["<unk>", "<s>", "</s>", *letters, *(chr(256 + place) for place in range(256 - len(letters))), "ab"]
    config = AutoConfig.for_model(family, vocab_size=len(tokens), **_OWN_SIZES.get(family, _SIZES) | sizes)
    writer = gguf.GGUFWriter(path, _NAMES.get(family, family))
    keys: Any = GGUF_CONFIG_MAPPING[family]
    for key, name in keys.items():
        value = getattr(config, name, None) if name else None
        if isinstance(value, int):
            writer.add_uint32(f"{writer.arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{writer.arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    make: Any = TENSOR_PROCESSORS.get(writer.arch, TensorProcessor)
    processor = make(config=config.to_dict())
    parameters, generator = model.state_dict(), np.random.default_rng(0)
    for name, parameter in get_gguf_hf_weights_map(model, processor).items():
        if name == "output.weight" or parameter not in parameters:  # the head is tied
            continue
        shape = list(parameters[parameter].shape)
        if "_exps" in name:
            name = f"{name.removesuffix('.weight')}.weight"
            shape[1] //= 2 if "gate_up" in parameter else 1
        if family == "gpt2" and "blk" in name:  # its matrices are transposed
            shape.reverse()
        if len(shape) == 1:
            writer.add_tensor(name, generator.normal(size=shape, scale=0.2).astype(np.float32))
            continue
        kind = gguf.GGMLQuantizationType[ups if ups and "up_exps" in name else form]
        writer.add_tensor(name, _blocks(generator, shape, kind), raw_dtype=kind)
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _blocks(generator: np.random.Generator, shape: list[int], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """A random matrix of ``kind``. Where the package cannot quantize to it, bytes are drawn that are small numbers."""
    values = generator.normal(size=shape, scale=0.2).astype(np.float32)
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        return random_blocks(generator, shape, kind.name)


def random_blocks(generator: np.random.Generator, shape: list[int], form: str) -> np.ndarray:
    """Random bytes of a matrix of this ``form``, which stand for finite numbers."""
    kind = gguf.GGMLQuantizationType[form]
    size, count = gguf.GGML_QUANT_SIZES[kind]
    rows = generator.integers(0, 256, (*shape[:-1], shape[-1] // size, count), dtype=np.uint8)
    while True:
        with np.errstate(all="ignore"):
            found = gguf.dequantize(rows.reshape(-1, count), kind)
        wrong = ~(np.abs(found) < 10).all(1)
        if not wrong.any():
            return rows.reshape(*shape[:-1], -1)
        rows.reshape(-1, count)[wrong] = generator.integers(0, 256, (wrong.sum(), count), dtype=np.uint8)
