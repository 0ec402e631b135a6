"""Writes a finished model as one folder that Transformers loads: all weights, the tokenizer, and nothing of elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from chainfed_ray.export.whole_model import WholeClassifier, WholeConfig, WholeLanguageModel
from chainfed_ray.hub import configuration, tokenizer
from chainfed_ray.model.adapters import LORA_SCALE
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.model.source import load_whole, weights_folder


def write_transformers(saved: SavedStack, folder: Path) -> None:
    """Write the base model of ``saved``, in the dtype that it has on disk, with its adapters and its tokenizer.

    LoRAs are added to the base model's own weights. So a language model's folder is a plain model of its family, and of a
    classifier only the head is ours.

    Raises:
        InvalidJob: the base model is not there.
        UnsupportedModel: the layers of the base model cannot be told apart.
    """
    base = weights_folder(saved.base)
    plain = saved.stack.is_lora and not saved.classes
    made = merged_model(saved, "auto") if plain else whole_model(saved, "auto")
    made.save_pretrained(folder)
    words = tokenizer(saved.base, base)
    if saved.classes:
        prepare_for_classes(words, saved.max_length)
    words.save_pretrained(folder)


def whole_model(saved: SavedStack, dtype: str) -> WholeClassifier | WholeLanguageModel:
    """The base model in ``dtype``, ``auto`` for its own, with the adapters of ``saved``; frozen, in evaluation mode.

    Raises:
        InvalidJob: the base model is not there.
        UnsupportedModel: the layers of the base model cannot be told apart.
    """
    folder = weights_folder(saved.base)
    configuration(folder)  # refuses a quantized model, in words
    kind, whole = (AutoModel, WholeClassifier) if saved.classes else (AutoModelForCausalLM, WholeLanguageModel)
    base = load_whole(kind, folder, dtype)
    base.config._name_or_path = ""  # a path of this machine
    if saved.stack.is_lora:
        _add_loras(base, saved)
        saved = replace(saved, stack=saved.stack.up_to(-1))  # the head alone
    made: Any = whole(WholeConfig.of(saved, base.config), base)
    made.stack.load_state_dict(saved.stack.tensors())
    if made.can_generate():
        made.generation_config = base.generation_config
    made.config.dtype = base.dtype
    frozen: WholeClassifier | WholeLanguageModel = made.eval().requires_grad_(False)
    return frozen


def merged_model(saved: SavedStack, dtype: str) -> PreTrainedModel:
    """The language model in ``dtype``, ``auto`` for its own, with the LoRAs of ``saved`` added to its weights.

    Raises:
        InvalidJob: the base model is not there.
    """
    folder = weights_folder(saved.base)
    configuration(folder)  # refuses a quantized model, in words
    model: Any = load_whole(AutoModelForCausalLM, folder, dtype)
    model.config._name_or_path = ""  # a path of this machine
    _add_loras(model, saved)
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen


def _add_loras(model: PreTrainedModel, saved: SavedStack) -> None:
    """Add the LoRAs of ``saved`` to the weights of its base model."""
    for layer in saved.stack.layers:
        lora = saved.stack.lora(layer)
        for path in lora.paths:
            module: Any = model.get_submodule(f"{saved.layers_path}.{layer}.{path}")
            part = lora.part(path)
            change = LORA_SCALE * part.lora_B.weight @ part.lora_A.weight
            module.weight.data += (change.T if isinstance(module, Conv1D) else change).to(module.weight.dtype)


def prepare_for_classes(words: PreTrainedTokenizerBase, max_length: int) -> None:
    """Make ``words(texts, padding=True, truncation=True)`` give what a classifier was trained on."""
    words.model_max_length, words.padding_side, words.truncation_side = max_length, "right", "right"
    if words.pad_token is None:  # of many decoders; the mask keeps it out
        words.pad_token = words.eos_token
