"""The base model that a process works with: its folder, and the whole of it or its lowest layers, as transformers has it."""

import copy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from chainfed_ray.errors import InvalidJob, PackageMissing, UnsupportedModel, how_to_get
from chainfed_ray.hub import configuration, one_line, read_object, resolve
from chainfed_ray.model.trunk import find_layers
from chainfed_ray.problem import shown
from chainfed_ray.reading import NF4, reading_from
from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.nf4_folder import FEWEST_ROWS, in_nf4


@dataclass(frozen=True)
class ModelSource:
    """The folder and dtype of the base model, and the ``scratch`` folder for prefix caches and other temporary files."""

    folder: Path
    dtype: torch.dtype
    scratch: Path


def weights_folder(name: str) -> Path:
    """The local folder of the weights ``name``: a job's ``model.base``, with ``#nf4`` after it for ``model.quantization: nf4``.

    Weights in NF4 are made of the base model's once. See ``hub.resolve`` and ``nf4_folder.in_nf4``.

    Raises:
        InvalidJob: there is no such base model, it cannot be read, or none of its matrices can be quantized.
        OSError: the disk of converted models is full, or their folder cannot be made.
    """
    base = name.removesuffix(NF4)
    folder = resolve(base)
    if base == name:
        return folder
    try:
        configuration(folder)  # refuses weights that are quantized already, in words
        made = in_nf4(folder)
    except PackageMissing as error:
        expected = f"a package for it to be installed: {how_to_get(error.extra)}"
        raise InvalidJob.at("model.quantization", "nf4", expected) from None
    except UnsupportedModel as error:
        raise InvalidJob.at("model.base", base, f"a model that can be streamed ({error.reason})") from None
    if made is None:
        reason = f"no matrix of its layers has {FEWEST_ROWS} rows or more, of a multiple of 64 weights"
        raise InvalidJob.at("model.base", base, f"a model that can be quantized ({reason})")
    return made


def load_whole(kind: Any, folder: Path, dtype: torch.dtype | str = "auto", layers: int | None = None) -> Any:
    """The model in ``folder``, as ``kind.from_pretrained`` gives it; ``kind`` is a class such as ``AutoModelForCausalLM``.

    With ``layers`` it has so many of its layers, the lowest, and what is around them; the others are not read.
    Transformers cannot read our quantized matrices: it is given their values.

    Raises:
        UnsupportedModel: the folder has no checkpoint that can be read.
    """
    checkpoint = Checkpoint(folder)
    try:
        if layers is None and not any(map(checkpoint.form, checkpoint.names)):
            return kind.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        config = configuration(folder)
        loaded = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
        above: tuple[str, ...] = ()
        with torch.device("meta"):
            if layers is not None:
                whole = kind.from_config(config)
                path = find_layers(whole, str(folder))
                above = tuple(f"{path}.{index}." for index in range(layers, len(whole.get_submodule(path))))
                _shorten(config, layers)
            blank = kind.from_config(config)
        values = {name: checkpoint.read(name, loaded) for name in checkpoint.names if not name.startswith(above)}
    finally:
        checkpoint.close()
    model = type(blank).from_pretrained(None, config=config, state_dict=values, dtype=loaded)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def check_generation(folder: Path) -> None:
    """Check what the folder of a language model says about writing. It is read once the model is served.

    Raises:
        UnsupportedModel: its generation_config.json cannot be read, or an end token in it is no number.
    """
    file = folder / "generation_config.json"
    if not file.exists():
        return

    def refusal(error: Exception) -> UnsupportedModel:
        return UnsupportedModel(str(folder), f"its {file.name} cannot be used ({one_line(error)})")

    with reading_from(str(file), refusal):
        said = read_object(file).get("eos_token_id")  # transformers leaves out a file that is no JSON, without a word
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    for token in said if isinstance(said, list) else [] if said is None else [said]:
        if type(token) is not int:
            reason = f"its {file.name} has {shown(token)} for eos_token_id; expected the ids of tokens"
            raise UnsupportedModel(str(folder), reason)


def lowest_layers(model: Any, layers: int) -> Any:
    """The model of the lowest ``layers`` layers of ``model``: modules of its own, with the same tensors, which are not copied.

    It has no hooks.
    """
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    shorter = copy.deepcopy(model, tensors)
    for module in shorter.modules():
        module._forward_hooks.clear()
    path = find_layers(shorter, type(model).__name__)
    kept: Any = shorter.get_submodule(path)
    shorter.set_submodule(path, nn.ModuleList(list(kept)[:layers]))
    _shorten(shorter.config, layers)
    return shorter


def _shorten(config: Any, layers: int) -> None:
    """Let a model's configuration have so many layers."""
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:layers]
