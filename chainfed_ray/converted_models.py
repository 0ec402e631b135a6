"""Converts models, once, into folders with quantized matrices: the form from which layers are read one at a time.

A GGUF file becomes such a folder. Matrices that are quantized in the file stay so (``block_forms.py``), in the order of rows
that the model has. Each is compared with the matrix that transformers makes of it. One that would not give the same values is
kept as float32, as those whose form is not known are: matrices that transformers transposes, or sums, or reads in two forms.

A folder with plain weights becomes one whose layers' matrices are in NF4 (QLoRA, arXiv 2305.14314, section 3), by bitsandbytes.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stderr, suppress
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import numpy as in_numpy
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainfed_ray.block_forms import FORMS, to_metadata
from chainfed_ray.cache_folder import cache_folder
from chainfed_ray.errors import PackageMissing

SHARD_BYTES = 2**29  # of a file with quantized matrices, and a tensor more
_CONVERSION = 2  # counted up when folders of the version before are not what is made now; they are left where they are
_NF4_CONVERSION = 1  # the same
_NF4 = FORMS["NF4"]
# A matrix of a layer: its name has the layer's number. What chooses experts is small, and its errors would choose others.
_OF_A_LAYER, _CHOOSES = re.compile(r"\.\d+\..*(weight|proj)$"), re.compile(r"(\bgate|router)\.weight$|norm")
_FEWEST = 64  # rows of a matrix; fewer save nothing
_COPIED, _INDEX = (".json", ".txt", ".model", ".jinja", ".md"), ".safetensors.index.json"


def from_gguf(file: Path) -> Path:
    """The folder with the model and the tokenizer of a GGUF ``file``. SmolLM2's 135M weights take half a minute to convert.

    Raises:
        PackageMissing: ``gguf`` is not installed.
        InvalidSetting: ``CHAINFED_MODELS`` is not an absolute path.
        Exception: whatever transformers raises for a file that it cannot read.
    """
    if find_spec("gguf") is None:
        raise PackageMissing(f"the model in {file.name}", "gguf", "smollm2")
    return _made_once(f"{file.stem}-v{_CONVERSION}-{_identity([file])}", lambda folder: _convert(file, folder))


def in_nf4(folder: Path) -> Path:
    """The folder with the model in ``folder``, whose layers' matrices are in NF4: a byte for two weights, 4.5 bits for each.

    Each 64 weights of a row are quantized together, so rows of other lengths stay as they are. So do embeddings, heads, norms
    and what chooses experts. A million weights take a tenth of a second.

    Raises:
        PackageMissing: ``bitsandbytes`` is not installed.
        InvalidSetting: ``CHAINFED_MODELS`` is not an absolute path.
        ValueError: no matrix of the model can be quantized.
        Exception: whatever safetensors raises for a file that it cannot read.
    """
    if find_spec("bitsandbytes") is None:
        raise PackageMissing("NF4", "bitsandbytes", "nf4")
    files = sorted(folder.glob("*.safetensors"))
    name = f"{folder.resolve().name}-nf4-v{_NF4_CONVERSION}-{_identity([folder / 'config.json', *files])}"
    return _made_once(name, lambda made: _quantize(folder, files, made))


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder called ``name`` in the cache, which ``make`` has made.

    One process makes it at a time, and others wait for it. The folder is renamed to its name when it is complete, so what a
    killed conversion leaves is never loaded.
    """
    folder = cache_folder("CHAINFED_MODELS", "models") / name
    if folder.is_dir():  # look before locking: where models are converted beforehand, the cache may be read-only
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # another process may have made it while this one waited
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a conversion that was killed
            make(unfinished)
            unfinished.rename(folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    local = {"local_files_only": True, "trust_remote_code": False}
    with redirect_stderr(StringIO()):  # where transformers draws progress bars
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **local)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **local)
    del model.config.quantization_config  # it is of the file
    folder.mkdir()
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # A tied head has no matrix of its own. transformers' way of saving would load DeepSpeed.
    tied = model.all_tied_weights_keys
    # Those of GPT-2 are transposed in memory, which safetensors does not notice in arrays.
    own = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    blocks = _blocks(file, model, own)
    path = folder / "model.safetensors"
    if not blocks:
        save_file(own, path, metadata={"format": "pt"})
        return
    kept = {name: blocks[name][1] if name in blocks else tensor.numpy() for name, tensor in own.items()}
    in_numpy.save_file(kept, path, {"format": "pt"} | to_metadata({name: form for name, (form, _) in blocks.items()}))


def _blocks(file: Path, model: Any, own: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """The matrices among the tensors ``own`` of ``model`` that can stay quantized: the form of each, and its blocks.

    transformers' code for a file's architecture is given bytes instead of values. For most matrices it does nothing, or moves
    whole rows, such as LLaMA's queries and keys, or puts the gates and ups of experts beside each other.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

    reader = GGUFReader(file)
    (architecture,) = read_field(reader, "general.architecture")
    make: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = make(config=model.config.to_dict())
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except Exception:  # a family that transformers reads in a newer way, of which this code knows nothing
        return {}
    forms: dict[str, str] = {}
    moved: dict[str, dict[str, Any]] = {"tensors": {}}
    for tensor in reader.tensors:
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        form = tensor.tensor_type.name
        if name is None or form not in FORMS:
            continue
        forms[name] = form
        # Where it computes with the values, it raises something, or the bytes are wrong: such a matrix is not kept.
        with suppress(Exception):
            done = processor.process(tensor.data, tensor.name, tensor_key_mapping=names, parsed_parameters=moved)
            if done.name in names:
                moved["tensors"][name] = done.weights
    blocks = {name: (forms[name], _as_numpy(found)) for name, found in moved["tensors"].items()}
    return {name: found for name, found in blocks.items() if name in own and _stands_for(*found, own[name].numpy())}


def _as_numpy(tensor: Any) -> Any:
    array = tensor.numpy() if hasattr(tensor, "numpy") else tensor
    return array if array.flags["C_CONTIGUOUS"] else array.copy(order="C")


def _stands_for(form: str, blocks: Any, values: Any) -> bool:
    """Whether ``blocks`` are exactly ``values``, in float32."""
    from gguf import GGMLQuantizationType, dequantize

    sizes = FORMS[form]
    if blocks.dtype != "uint8" or (*blocks.shape[:-1], blocks.shape[-1] // sizes.bytes * sizes.values) != values.shape:
        return False
    found = dequantize(blocks, GGMLQuantizationType[form])
    return values.dtype == "float32" and bool((found.view("uint32") == values.view("uint32")).all())


def _quantize(source: Path, files: Iterable[Path], folder: Path) -> None:
    """Write the model in ``source``, a part at a time, so that only a part of it is in memory."""
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix in _COPIED and not file.name.endswith(_INDEX):
            shutil.copyfile(file, folder / file.name)
    places: dict[str, str] = {}
    quantized = False
    for number, (tensors, names) in enumerate(_parts(files), 1):
        shard = f"model-{number:05}.safetensors"
        save_file(tensors, folder / shard, {"format": "pt"} | to_metadata(dict.fromkeys(names, "NF4")))
        places |= dict.fromkeys(tensors, shard)
        quantized |= bool(names)
    if not quantized:
        raise ValueError(f"no matrix of its layers has {_FEWEST} rows or more, of a multiple of {_NF4.values} weights")
    (folder / f"model{_INDEX}").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _parts(files: Iterable[Path]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The tensors of a checkpoint, some at a time, and the names of those among them that are quantized."""
    tensors: dict[str, Any] = {}
    names: list[str] = []
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                if sum(tensor.nbytes for tensor in tensors.values()) > SHARD_BYTES:
                    yield tensors, names
                    tensors, names = {}, []
                tensors[name] = opened.get_tensor(name)
                if _is_quantized(name, tensors[name]):
                    tensors[name] = nf4_blocks(tensors[name])
                    names.append(name)
    yield tensors, names


def _is_quantized(name: str, tensor: Any) -> bool:
    if not (tensor.is_floating_point() and tensor.dim() > 1 and _OF_A_LAYER.search(name) and not _CHOOSES.search(name)):
        return False
    return bool(tensor.shape[-2] >= _FEWEST and tensor.shape[-1] % _NF4.values == 0)


def nf4_blocks(values: Any) -> Any:
    """[…, N, K] → the blocks […, N, bytes of a row]: for each 64 values their largest, as float32, and two in each byte."""
    from bitsandbytes.functional import quantize_4bit  # of the extra `nf4`; its import takes seconds

    packed, state = quantize_4bit(values.float(), blocksize=_NF4.values, compress_statistics=False, quant_type="nf4")
    blocks = packed.new_empty(len(state.absmax), _NF4.bytes)
    blocks[:, :4] = state.absmax.view(-1, 1).view(packed.dtype)
    blocks[:, 4:] = packed.view(len(blocks), -1)
    return blocks.view(*values.shape[:-1], -1)


def _identity(files: Iterable[Path]) -> str:
    """Tells this content of files from another one, without reading them: their paths, sizes and times of change."""
    found = [(file.resolve(), file.stat()) for file in files]
    told = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in found)
    return hashlib.sha256(told.encode()).hexdigest()[:12]
