"""Converts a folder with plain weights, once, into one whose layers' matrices are in NF4 (QLoRA, arXiv 2305.14314, section 3).

The checkpoint is read by byte ranges, a piece of a tensor at a time, and written shard by shard. What was written stays if the
process is killed, and the next one goes on after it.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from chainfed_ray.block_forms import FORMS, to_metadata
from chainfed_ray.cache_folder import cache_folder, made_once, shortened
from chainfed_ray.errors import PackageMissing, UnsupportedModel
from chainfed_ray.reading import reading_from
from chainfed_ray.streaming.checkpoint import DTYPES, Checkpoint, shards

SHARD_BYTES = 2**26  # of a file that is written; a tensor with more has a file of its own
FEWEST_ROWS = 64  # of a matrix; fewer save nothing
# Counted up when other folders are made of a model, or other shards; folders of the version before are left where they are.
_CONVERSION = 2
_NF4 = FORMS["NF4"]
_AT_ONCE = 2**20  # values that are read and quantized; bitsandbytes holds some 25 bytes for each
_QUANTIZED = (torch.float32, torch.float16, torch.bfloat16)
# A matrix of a layer: its name has the layer's number. What chooses experts, or has a few numbers for each head, is small, and
# its errors would weigh more.
_OF_A_LAYER = re.compile(r"\.\d+\..*(weight|proj)$")
_STAYS = re.compile(r"(^|\.)(gate|(\w*_)?router|relative_attention_bias|weights_proj)(\.|$)|norm")
_COPIED, _INDEX = (".json", ".txt", ".model", ".jinja", ".md"), "model.safetensors.index.json"


def in_nf4(folder: Path) -> Path | None:
    """The folder with the model in ``folder``, whose layers' matrices are in NF4: a byte for two weights, 4.5 bits for each.

    Each 64 weights of a row are quantized together, so rows of other lengths stay as they are. So do embeddings, heads, norms
    and what chooses experts. None if no matrix of the model can be quantized.

    Raises:
        PackageMissing: ``bitsandbytes`` is not installed.
        InvalidSetting: ``CHAINFED_MODELS`` is not an absolute path.
        UnsupportedModel: the checkpoint cannot be read, or its matrices are quantized already.
        OSError: the disk is full, or ``CHAINFED_MODELS`` cannot be made.
    """
    identity = _identity(folder)
    name = f"{shortened(folder.resolve().name)}-nf4-v{_CONVERSION}-{identity}"
    made = cache_folder("CHAINFED_MODELS", "models") / name
    if made.is_dir():
        return made
    checkpoint = Checkpoint(folder)
    try:
        if form := next((form for form in map(checkpoint.form, sorted(checkpoint.names)) if form), None):
            raise UnsupportedModel(str(folder), f"its matrices are quantized already ({form})")
        if not any(_is_quantized(checkpoint, name) for name in checkpoint.names):
            return None
        if find_spec("bitsandbytes") is None:
            raise PackageMissing("NF4", "bitsandbytes", "nf4")
        return made_once(name, lambda unfinished: _convert(checkpoint, identity, unfinished))
    finally:
        checkpoint.close()


def _convert(checkpoint: Checkpoint, identity: str, made: Path) -> None:
    """Write the model into ``made``, where shards of a conversion that was killed may be: they are not written again."""
    made.mkdir(exist_ok=True)
    places: dict[str, str] = {}
    try:
        for file in _copied(checkpoint.folder):
            _copy(file, made / file.name)
        for number, names in enumerate(_parts(checkpoint), 1):
            shard = made / f"model-{number:05}.safetensors"
            if not shard.exists():
                _write(checkpoint, names, shard)
            places |= dict.fromkeys(names, shard.name)
        if _identity(checkpoint.folder) != identity:
            raise UnsupportedModel(str(checkpoint.folder), "its files changed while they were read")
    except UnsupportedModel:
        shutil.rmtree(made, ignore_errors=True)  # nobody would go on with it
        raise
    (made / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _copied(folder: Path) -> list[Path]:
    """What a model's folder has beside its weights: its configuration, its tokenizer, its card."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and file.suffix in _COPIED and not file.name.endswith(".safetensors.index.json")
    )


def _copy(file: Path, to: Path) -> None:
    with reading_from(
        str(file), lambda error: UnsupportedModel(str(file.parent), f"{file.name} cannot be read ({error})")
    ):
        opened = file.open("rb")
    with opened, to.open("wb") as written:
        shutil.copyfileobj(opened, written)


def _identity(folder: Path) -> str:
    """Tells this model from another one, without reading its weights: its folder, and its files' sizes and times of change."""
    files = [*_copied(folder), folder / _INDEX, *shards(folder)]
    found = [(file.name, file.stat()) for file in files if file.exists()]
    told = "\n".join([str(folder.resolve()), *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in found)])
    return hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()[:12]


def _is_quantized(checkpoint: Checkpoint, name: str) -> bool:
    shape = checkpoint.shape(name)
    if len(shape) < 2 or checkpoint.dtype(name) not in _QUANTIZED:
        return False
    if not _OF_A_LAYER.search(name) or _STAYS.search(name):
        return False
    return shape[-2] >= FEWEST_ROWS and shape[-1] % _NF4.values == 0 and math.prod(shape) > 0


def _stored_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The shape with which a tensor is written: that of its blocks' bytes, if it is quantized."""
    *above, last = checkpoint.shape(name) or (1,)
    if _is_quantized(checkpoint, name):
        return (*above, last // _NF4.values * _NF4.bytes)
    return checkpoint.shape(name)


def _stored_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    return torch.uint8 if _is_quantized(checkpoint, name) else checkpoint.dtype(name)


def _stored_bytes(checkpoint: Checkpoint, name: str) -> int:
    return math.prod(_stored_shape(checkpoint, name)) * _stored_dtype(checkpoint, name).itemsize


def _parts(checkpoint: Checkpoint) -> list[list[str]]:
    """The names of the tensors of each shard. They follow from the checkpoint's headers, so each process has the same."""
    parts: list[list[str]] = []
    left = 0
    for name in sorted(checkpoint.names):
        size = _stored_bytes(checkpoint, name)
        if not parts or size > left:
            parts.append([])
            left = SHARD_BYTES
        parts[-1].append(name)
        left -= size
    return parts


def _write(checkpoint: Checkpoint, names: Sequence[str], shard: Path) -> None:
    """Write a safetensors file. It has its name once it is whole and on the disk."""
    forms = {name: "NF4" for name in names if _is_quantized(checkpoint, name)}
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | to_metadata(forms)}
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # The widest numbers first: so each tensor begins at a multiple of its numbers' size, which readers that map files need.
    in_order = sorted(names, key=lambda name: -_stored_dtype(checkpoint, name).itemsize)
    end = 0
    for name in in_order:
        begin, end = end, end + _stored_bytes(checkpoint, name)
        shape, dtype = _stored_shape(checkpoint, name), codes[_stored_dtype(checkpoint, name)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = shard.with_name(f"{shard.name}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in in_order:
            for piece in _pieces(checkpoint, name):
                file.write(piece.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(shard)


def _pieces(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """The bytes of a tensor as it is written. They are made of its numbers in their order, whatever its shape."""
    is_quantized, dtype = _is_quantized(checkpoint, name), checkpoint.dtype(name)
    each = _NF4.values if is_quantized else 1
    rows, flat = math.prod(checkpoint.shape(name)) // each, f"{name}[:]"
    checkpoint.cut(flat, name, 0, 1, (rows, each))
    step = _AT_ONCE // each
    buffer = torch.empty(min(step, rows) * each * dtype.itemsize, dtype=torch.uint8)
    for first in range(0, rows, step):
        numbers = checkpoint.slice(flat, first, min(step, rows - first), buffer, dtype)
        yield (_blocks(numbers.float()) if is_quantized else numbers).view(-1).view(torch.uint8)


def _blocks(values: Tensor) -> Tensor:
    """[n, 64] → the blocks [n, 36] as bytes: the largest of each 64 values, as float32, and two values in each byte."""
    from bitsandbytes.functional import quantize_4bit  # of the extra `nf4`; its import takes seconds

    packed, state = quantize_4bit(values, blocksize=_NF4.values, compress_statistics=False, quant_type="nf4")
    blocks = torch.empty(len(values), _NF4.bytes, dtype=torch.uint8)
    blocks[:, :4] = state.absmax.view(-1, 1).view(torch.uint8)
    blocks[:, 4:] = packed.view(len(values), -1)
    return blocks
