"""Converts a GGUF file, once, into a folder with safetensors weights: the form from which layers are read one at a time.

Matrices that are quantized in the file stay so in the folder (``block_forms.py``), in the order of rows that the model has.
Each is compared with the matrix that transformers makes of it. One that would not give the same values is kept as float32, as
those whose form is not known are: matrices that transformers transposes, or sums, or reads in two forms at once.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from safetensors import numpy as in_numpy
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainfed_ray.block_forms import FORMS, to_metadata
from chainfed_ray.cache_folder import made_once, shortened
from chainfed_ray.errors import PackageMissing, UnsupportedModel

_CONVERSION = 2  # counted up when folders of the version before are not what is made now; they are left where they are


def converted(file: Path) -> Path:
    """The folder with the model and the tokenizer of a GGUF ``file``. SmolLM2's 135M weights take half a minute to convert.

    Raises:
        PackageMissing: ``gguf`` is not installed.
        InvalidSetting: ``CHAINFED_MODELS`` is not an absolute path.
        UnsupportedModel: the file cannot be read, or transformers has no such model.
        OSError: the disk is full, or ``CHAINFED_MODELS`` cannot be made.
    """
    if find_spec("gguf") is None:
        raise PackageMissing(f"the model in {file.name}", "gguf", "smollm2")
    try:
        name = f"{shortened(file.stem)}-v{_CONVERSION}-{_identity(file)}"
    except OSError as error:
        raise UnsupportedModel(str(file), error.strerror or type(error).__name__) from None
    return made_once(name, lambda folder: _convert(file, folder))


def _convert(file: Path, folder: Path) -> None:
    try:
        model, tokenizer = _read(file)
        # A tied head has no matrix of its own. transformers' way of saving would load DeepSpeed.
        tied = model.all_tied_weights_keys
        # Those of GPT-2 are transposed in memory, which safetensors does not notice in arrays.
        own = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
        blocks = _blocks(file, model, own)
    except Exception as error:  # a file may hold anything, and so may what its reader raises
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnsupportedModel(str(file), reason) from None
    shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was killed
    folder.mkdir()
    with _writing():
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        path = folder / "model.safetensors"
        if not blocks:
            save_file(own, path, metadata={"format": "pt"})
            return
        kept = {name: blocks[name][1] if name in blocks else tensor.numpy() for name, tensor in own.items()}
        forms = to_metadata({name: form for name, (form, _) in blocks.items()})
        in_numpy.save_file(kept, path, {"format": "pt"} | forms)


def _read(file: Path) -> tuple[Any, Any]:
    """The model and the tokenizer, as transformers has them."""
    local = {"local_files_only": True, "trust_remote_code": False}
    with redirect_stderr(StringIO()):  # where transformers draws progress bars
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **local)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **local)
    del model.config.quantization_config  # it is of the file
    return model, tokenizer


@contextmanager
def _writing() -> Iterator[None]:
    """Raise what a disk does not take as an ``OSError``: libraries in Rust have errors of their own for it."""
    try:
        yield
    except Exception as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
        raise


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
