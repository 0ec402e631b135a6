"""The base model that a process works with: its folder, and the whole of it as one model of transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from chainfed_ray.hub import configuration
from chainfed_ray.streaming.checkpoint import Checkpoint


@dataclass(frozen=True)
class ModelSource:
    """The folder and dtype of the base model, and the ``scratch`` folder for prefix caches and other temporary files."""

    folder: Path
    dtype: torch.dtype
    scratch: Path


def load_whole(kind: Any, folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """The model in ``folder``, as ``kind.from_pretrained`` gives it; ``kind`` is a class such as ``AutoModelForCausalLM``.

    Transformers cannot read the quantized matrices of a converted GGUF file: it is given their values.

    Raises:
        UnsupportedModel: the folder has no checkpoint that can be read.
    """
    checkpoint = Checkpoint(folder)
    try:
        if not any(map(checkpoint.form, checkpoint.names)):
            return kind.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        config = configuration(folder)
        loaded = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
        values = {name: checkpoint.read(name, loaded) for name in checkpoint.names}
    finally:
        checkpoint.close()
    with torch.device("meta"):
        model_class = type(kind.from_config(config))
    model = model_class.from_pretrained(None, config=config, state_dict=values, dtype=loaded)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model
