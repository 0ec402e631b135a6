"""Converts a GGUF file, once, into a folder with safetensors weights: the form from which layers are read one at a time.

Matrices that are quantized in the file stay so in the folder (``block_forms.py``), in the order of rows that the model has.
Each is compared with the matrix that transformers makes of it. One that would not give the same values is kept as float32, as
those whose form is not known are: matrices that transformers transposes, or sums, or reads in two forms at once.
"""

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr, suppress
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import numpy as in_numpy
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainfed_ray.block_forms import FORMS, to_metadata
from chainfed_ray.cache_folder import cache_folder
from chainfed_ray.errors import PackageMissing

_CONVERSION = 2  # counted up when folders of the version before are not what is made now; they are left where they are


def converted(file: Path) -> Path:
    """The folder with the model and the tokenizer of a GGUF ``file``. SmolLM2's 135M weights take half a minute to convert.

    One process converts at a time, and others wait for it. The folder is renamed to its name when it is complete, so what a
    killed conversion leaves is never loaded.

    Raises:
        PackageMissing: ``gguf`` is not installed.
        InvalidSetting: ``CHAINFED_MODELS`` is not an absolute path.
        Exception: whatever transformers raises for a file that it cannot read.
    """
    if find_spec("gguf") is None:
        raise PackageMissing(f"the model in {file.name}", "gguf", "smollm2")
    folder = cache_folder("CHAINFED_MODELS", "models") / f"{file.stem}-v{_CONVERSION}-{_identity(file)}"
    if folder.is_dir():  # look before locking: where models are converted beforehand, the cache may be read-only
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # another process may have made it while this one waited
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a conversion that was killed
            _convert(file, unfinished)
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


def _identity(file: Path) -> str:
    """Tells this content of a file from another one, without reading it: its path, size and time of change."""
    found = file.stat()
    return hashlib.sha256(f"{file.resolve()} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:12]
