"""Converts a GGUF file, once, into a folder with safetensors weights: the form from which layers are read one at a time.

Matrices that are quantized in the file stay so in the folder (``block_forms.py``), in the order of rows that the model has.
Each is compared with the matrix that transformers makes of it. One that would not give the same values is kept as float32, as
those whose form is not known are: matrices that transformers transposes, or sums, or reads in two forms at once.
"""

import hashlib
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, BinaryIO

from safetensors import numpy as in_numpy
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_accelerate_available

from chainfed_ray.block_forms import FORMS, to_metadata
from chainfed_ray.cache_folder import made_once, shortened, writing
from chainfed_ray.errors import PackageMissing, UnsupportedModel
from chainfed_ray.problem import some_of
from chainfed_ray.reading import reading_from

# Of the format (gguf.md in ggml's documents): the bytes of each type of value but texts and lists, and what else is needed.
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _FLOAT32, _TEXT, _LIST = 4, 6, 8, 9
_VERSIONS, _ALIGNMENT, _MOST_DIMENSIONS = (2, 3), 32, 4
_LONGEST_NAME, _SHORT = 2**16 - 1, 100  # bytes of a key; of a text whose value is kept
_POSITIVE = (".block_count", ".embedding_length", ".attention.head_count", ".feed_forward_length")
Value = int | float | str
_ONE_MODEL = Lock()  # is read at a time
_CONVERSION = 3  # counted up when folders of the version before are not what is made now; they are left where they are


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
    with reading_from(str(file), lambda error: UnsupportedModel(str(file), _why(error))):
        name = f"{shortened(file.stem)}-v{_CONVERSION}-{_identity(file)}"
    return made_once(name, lambda folder: _convert(file, folder))


def _convert(file: Path, folder: Path) -> None:
    from gguf import GGUFReader

    with reading_from(str(file), lambda error: UnsupportedModel(str(file), _why(error))):
        said = _checked(file)
        with _alone(file) as place:
            model, tokenizer = _read(place)
        reader = GGUFReader(file)
        _set_frequencies(model.config, said, _frequency_factors(reader))
        # A tied head has no matrix of its own. transformers' way of saving would load DeepSpeed.
        tied = model.all_tied_weights_keys
        # Those of GPT-2 are transposed in memory, which safetensors does not notice in arrays.
        own = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
        blocks = _blocks(reader, model, own)
    shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was killed
    folder.mkdir()
    with writing():
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


def _why(error: Exception) -> str:
    words = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return next((line.strip() for line in words.splitlines() if line.strip()), type(error).__name__)


def _checked(file: Path) -> dict[str, Value]:
    """Check that the file is whole, before libraries read it that take its counts and offsets for true.

    Returns its keys with a number of 32 bits or a short text, and their values.

    Raises:
        ValueError: it is not, or is of another version or byte order; with a sentence about it.
    """
    with file.open("rb") as opened:
        parts = _Parts(opened, file.stat().st_size)
        if (magic := parts.take(4, "its first word")) != b"GGUF":
            raise ValueError(f"it begins with {magic!r}; expected b'GGUF'")
        version = parts.take(4, "its version")
        if int.from_bytes(version, "big") in _VERSIONS:
            raise ValueError("its numbers are big-endian; expected little-endian")
        if (number := int.from_bytes(version, "little")) not in _VERSIONS:
            raise ValueError(f"it is of version {number} of GGUF; expected 2 or 3")
        tensors, keys = parts.count(24, "tensors"), parts.count(12, "keys")
        found = dict(parts.key() for _ in range(keys))
        said = {name: value for name, value in found.items() if value is not None}
        for name, value in said.items():
            if name.endswith(_POSITIVE) and value == 0:
                raise ValueError(f"it has 0 for {name}; expected at least 1")
            if name.endswith(".block_count") and isinstance(value, int) and value > tensors:
                raise ValueError(f"it has {value} for {name}, and {tensors} tensors")
        alignment = said.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise ValueError(f"it has {alignment} for general.alignment; expected a multiple of 8")
        ends = _ends(parts, tensors, alignment)
        layers = said.get(key := f"{said.get('general.architecture')}.block_count")
        of_layers = {name: int(place[1]) for name in ends if (place := re.match(r"blk\.(\d+)\.", name))}
        if isinstance(layers, int) and (above := [name for name, layer in of_layers.items() if layer >= layers]):
            raise ValueError(f"it has {layers} for {key}, and a tensor {above[0]}")
        begin = -(-opened.tell() // alignment) * alignment
        if beyond := [name for name, end in ends.items() if begin + end > parts.size]:
            raise ValueError(f"it is truncated: {beyond[0]} ends beyond its {parts.size} bytes")
        return said


def _ends(parts: "_Parts", tensors: int, alignment: int) -> dict[str, int]:
    """Where each of so many tensors ends, in bytes after the place where they begin.

    Raises:
        ValueError: one is there twice, or is of an unknown type, or has a shape or a place that it cannot have.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    ends: dict[str, int] = {}
    for _ in range(tensors):
        name, shape, kind, offset = parts.tensor()
        if name in ends:
            raise ValueError(f"it has {name} twice")
        if kind not in set(GGMLQuantizationType):
            raise ValueError(f"it has {name} in the type {kind}, which is not known")
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if shape and (min(shape) < 1 or shape[0] % values):
            raise ValueError(
                f"it has {name} in the shape {list(shape)}; expected rows of a multiple of {values} values"
            )
        if offset % alignment:
            raise ValueError(f"it has {name} at the offset {offset}; expected a multiple of {alignment}")
        ends[name] = offset + prod(shape) // values * size
    return ends


def _frequency_factors(reader: Any) -> dict[str, Any]:
    """The factors [head size / 2] by which a file's rotary frequencies are divided, by the names of the tensors with them.

    Files of Llama 3 have one such tensor; it stands for their ``rope_type: llama3``.
    """
    named = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
    return {each.name: each.data for each in reader.tensors if each.name in named and (each.data != 1).any()}


def _set_frequencies(config: Any, said: dict[str, Value], factors: dict[str, Any]) -> None:
    """Let a model have the rotary frequencies of its file: transformers leaves out what most files say of them.

    Raises:
        ValueError: transformers has no such frequencies.
    """
    for name, found in factors.items():
        parameters = getattr(config, "rope_parameters", None) or {}
        if name != "rope_freqs.weight" or "rope_theta" not in parameters:
            raise ValueError(f"it has {name}, which transformers does not read from a GGUF file")
        most, equal = config.max_position_embeddings, [float(factor) for factor in found]
        config.rope_parameters = {
            "rope_type": "longrope",  # it divides frequencies by factors: here the same for short texts and for long ones
            "rope_theta": parameters["rope_theta"],
            "short_factor": equal,
            "long_factor": equal,
            "original_max_position_embeddings": most,
            "factor": 1.0,
            "attention_factor": 1.0,
        }
    rope = f"{said.get('general.architecture')}.rope"
    for scale in (f"{rope}.scaling.factor", f"{rope}.scale_linear"):  # of the type linear, where none is said
        if f"{rope}.scaling.type" not in said and said.get(scale, 1) not in (0, 1):
            raise ValueError(f"it has {said[scale]:g} for {scale}, which transformers does not read from a GGUF file")
    kind = said.get(key := f"{rope}.scaling.type", "none")
    if kind not in ("none", (getattr(config, "rope_parameters", None) or {}).get("rope_type")):
        raise ValueError(f"it has {kind!r} for {key}, which transformers does not read from a GGUF file")


class _Parts:
    """Reads the parts of a GGUF file in their order. What says that it is longer than the rest of the file is not read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size = file, size

    def take(self, count: int, what: str) -> bytes:
        """So many bytes.

        Raises:
            ValueError: the file has fewer.
        """
        if count > self.size - self._file.tell():
            raise ValueError(f"it is truncated: it ends within {what}")
        return self._file.read(count)

    def count(self, least: int, what: str) -> int:
        """How many parts follow, of which each takes ``least`` bytes or more.

        Raises:
            ValueError: the file has no room for them.
        """
        if (number := int.from_bytes(self.take(8, f"the number of its {what}"), "little")) * least > self.size:
            raise ValueError(f"it has {number} {what} in a file of {self.size} bytes")
        return number

    def key(self) -> tuple[str, Value | None]:
        """The name of a key, and its value if that is a number of 32 bits or a short text."""
        name = self._name("the name of a key")
        kind = self._number(f"the type of {name}")
        if kind == _UINT32:
            return name, self._number(name)
        if kind == _FLOAT32:
            (number,) = struct.unpack("<f", self.take(4, name))
            return name, float(number)
        if kind == _TEXT:
            if (length := self._length(name)) <= _SHORT:
                return name, self.take(length, name).decode(errors="replace")
            self._skip(length, name)
        elif kind == _LIST:
            kind, many = self._number(f"the type of {name}"), self.count(1, f"entries of {name}")
            if kind == _TEXT:
                for _ in range(many):
                    self._skip(self._length(name), name)
            else:
                self._skip(self._bytes(kind, name) * many, name)
        else:
            self._skip(self._bytes(kind, name), name)
        return name, None

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """The name of a tensor, its shape with the shortest distance first, its type and its offset."""
        name = self._name("the name of a tensor")
        dimensions = self._number(f"the shape of {name}")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"it has {name} with {dimensions} dimensions; expected at most {_MOST_DIMENSIONS}")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions, f"the shape of {name}"))
        kind, offset = struct.unpack("<IQ", self.take(12, f"the place of {name}"))
        return name, shape, kind, offset

    def _bytes(self, kind: int, name: str) -> int:
        if kind not in _VALUE_BYTES:
            raise ValueError(f"it has {name} in the type {kind}, which cannot be read")
        return _VALUE_BYTES[kind]

    def _number(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def _length(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def _name(self, what: str) -> str:
        if (length := self._length(what)) > _LONGEST_NAME:
            raise ValueError(f"it has {length} bytes for {what}; expected at most {_LONGEST_NAME}")
        return self.take(length, what).decode(errors="replace")

    def _skip(self, count: int, what: str) -> None:
        if count > self.size - self._file.tell():
            raise ValueError(f"it is truncated: it ends within {what}")
        self._file.seek(count, os.SEEK_CUR)


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """A link to the file in a folder of its own: transformers would take another model's tokenizer beside it for this one's."""
    with TemporaryDirectory() as folder:
        link = Path(folder, file.name)
        link.symlink_to(file.resolve())
        yield link


def _read(file: Path) -> tuple[Any, Any]:
    """The model and the tokenizer, as transformers has them.

    Raises:
        ValueError: the file lacks a tensor or a tokenizer, or contradicts itself.
        Exception: whatever else transformers raises.
    """
    local: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with redirect_stderr(StringIO()), accelerate_known():  # stderr is where transformers draws progress bars
        loading: Any = AutoModelForCausalLM.from_pretrained(file.parent, **local, **told)
        model, found = loading
        if others := sorted(found["mismatched_keys"]):
            name, shape, expected = others[0]
            more = f", and {len(others) - 1} more have other shapes, too" if others[1:] else ""
            raise ValueError(
                f"its tensor for {name} is {list(shape)}; its keys, or what is usual without, ask for {list(expected)}{more}"
            )
        if missing := sorted(found["missing_keys"]):  # transformers draws random numbers for them
            raise ValueError(f"it has no tensor for {some_of(missing)}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **local)
        except Exception as error:
            reason = f"no tokenizer can be made of its keys tokenizer.ggml ({type(error).__name__}: {error})"
            raise ValueError(reason) from None
    del model.config.quantization_config  # it is of the file
    return model, tokenizer


@contextmanager
def accelerate_known() -> Iterator[None]:
    """Let transformers read GGUF files where Accelerate is left out (``lean_imports``): it asks for it, and uses nothing."""
    module: Any = import_module("transformers.modeling_utils")
    with _ONE_MODEL:
        before, level = module.is_accelerate_available, module.logger.level
        module.is_accelerate_available = is_accelerate_available
        module.logger.setLevel("ERROR")  # its report on tensors that do not fit: our errors say it in a line
        try:
            yield
        finally:
            module.is_accelerate_available = before
            module.logger.setLevel(level)


def _blocks(reader: Any, model: Any, own: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """The matrices among the tensors ``own`` of ``model`` that can stay quantized: the form of each, and its blocks.

    transformers' code for a file's architecture is given bytes instead of values. For most matrices it does nothing, or moves
    whole rows, such as LLaMA's queries and keys, or puts the gates and ups of experts beside each other.
    """
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

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
