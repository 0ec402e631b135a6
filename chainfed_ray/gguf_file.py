"""Converts a GGUF file, once, into a folder with safetensors weights: the form from which layers are read one at a time.

The matrices of a GGUF file are often quantized. The folder has them as float32 values, which are exactly those that the
quantized ones stand for.
"""

import hashlib
import shutil
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainfed_ray.cache_folder import cache_folder
from chainfed_ray.errors import PackageMissing


def converted(file: Path) -> Path:
    """The folder with the model and the tokenizer of a GGUF ``file``. SmolLM2's 135M weights take 20 seconds to convert.

    One process converts at a time, and others wait for it. The folder is renamed to its name when it is complete, so what a
    killed conversion leaves is never loaded.

    Raises:
        PackageMissing: ``gguf`` is not installed.
        InvalidSetting: ``CHAINFED_MODELS`` is not an absolute path.
        Exception: whatever transformers raises for a file that it cannot read.
    """
    if find_spec("gguf") is None:
        raise PackageMissing(f"the model in {file.name}", "gguf", "smollm2")
    folder = cache_folder("CHAINFED_MODELS", "models") / f"{file.stem}-{_identity(file)}"
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
    with redirect_stderr(StringIO()):  # where transformers draws progress bars
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    del model.config.quantization_config  # the values are float32 now
    folder.mkdir()
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # A tied head has no matrix of its own. transformers' way of saving would load DeepSpeed.
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})


def _identity(file: Path) -> str:
    """Tells this content of a file from another one, without reading it: its path, size and time of change."""
    found = file.stat()
    return hashlib.sha256(f"{file.resolve()} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:12]
