"""Models of well-known shapes with random weights, which exist in a temporary folder while they are measured."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

_BLOCK = 2**22  # random numbers that all weights repeat, so that a model is written in seconds
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Shape:
    """A model, the dtype of its weights, and the batch with which it is measured."""

    name: str
    family: str
    sizes: dict[str, int]
    dtype: str
    batch: int
    tokens: int
    language_model: bool

    @property
    def model(self) -> tuple[str, str]:
        """The family and sizes of the model. Shapes with equal ones can share a folder of weights."""
        return self.family, json.dumps(self.sizes)

    def build(self) -> Any:
        """The model on the meta device: its parameters have shapes, and take no memory."""
        kind = AutoModelForCausalLM if self.language_model else AutoModel
        with torch.device("meta"):
            config = AutoConfig.for_model(self.family, **self.sizes)
            return kind.from_config(config, dtype=getattr(torch, self.dtype))  # type: ignore[no-untyped-call]


_ROBERTA_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
_LLAMA2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}
_SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("roberta-large-16x128", "roberta", _ROBERTA_LARGE, "float32", 16, 128, language_model=False),
        Shape("smollm2-135m-16x64", "llama", _SMOLLM2_135M, "float32", 16, 64, language_model=True),
        Shape("llama2-7b-1x128", "llama", _LLAMA2_7B, "bfloat16", 1, 128, language_model=True),
        Shape("llama2-7b-4x256", "llama", _LLAMA2_7B, "bfloat16", 4, 256, language_model=True),
    )
}
# The shapes of the evaluation benchmark, with an evaluator's batch.
EVALUATED = (
    Shape("roberta-large-4x128", "roberta", _ROBERTA_LARGE, "float32", 4, 128, language_model=False),
    Shape("llama2-7b-4x128", "llama", _LLAMA2_7B, "bfloat16", 4, 128, language_model=True),
)
# The shapes of the plan benchmark, with the batch of an optimizer step.
PLANNED = (
    Shape("smollm2-135m-16x32", "llama", _SMOLLM2_135M, "float32", 16, 32, language_model=True),
    Shape("smollm2-135m-16x96", "llama", _SMOLLM2_135M, "float32", 16, 96, language_model=True),
    Shape("roberta-large-16x128", "roberta", _ROBERTA_LARGE, "float32", 16, 128, language_model=False),
    Shape("llama2-7b-16x128", "llama", _LLAMA2_7B, "bfloat16", 16, 128, language_model=True),
)


@contextmanager
def written(shape: Shape, parent: Path) -> Iterator[Path | str]:
    """A folder in ``parent`` with the model's configuration and random weights; or a sentence if the disk is too small."""
    model = shape.build()
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    needed = sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(parent).free
    if free < 1.2 * needed:
        yield f"its weights take {needed / 2**30:.1f} GiB of disk, and {free / 2**30:.1f} GiB are free"
        return
    with tempfile.TemporaryDirectory(prefix="chainfed-benchmark-", dir=parent) as folder:
        model.config.save_pretrained(folder)
        _write(Path(folder) / "model.safetensors", tensors)
        yield Path(folder)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file with small random numbers for matrices, and ones for norms and biases."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    head = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(_BLOCK, generator=generator) * 0.02
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for place, tensor in enumerate(tensors.values()):
            if tensor.dim() == 1:
                file.write(_bytes(torch.ones(tensor.shape, dtype=tensor.dtype)))
                continue
            values = block.roll(7919 * place).to(tensor.dtype)
            for start in range(0, tensor.numel(), _BLOCK):
                file.write(_bytes(values[: tensor.numel() - start]))


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().view(torch.uint8).numpy().data)
