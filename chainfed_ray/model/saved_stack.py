"""Saves a finished stack as a folder in PEFT's format, which ``PeftModel.from_pretrained`` loads (``peft_method.py``).

Folders are written and read here without PEFT, whose import takes seconds, and without the base model. A stack with a head is
for a ``SequenceClassifier``. A stack without one is for a causal language model, which uses its own head. ::

    adapter_config.json           the method, its sizes, the modules that have an adapter
    adapter_model.safetensors     base_model.model.<module>.chainfed_…

A stack of LoRAs is a plain LoRA of PEFT's on the base model, which every engine loads that loads these. What only
this project needs is beside it: also a classifier's head, since PEFT knows no head over pooled features. ::

    adapter_config.json           what PEFT's LoraConfig has
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight, …
    chainfed.json                 the base model, the maximum length, and the classes
    head.safetensors              norm.weight, norm.bias, linear.weight and linear.bias
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from chainfed_ray.errors import CorruptCommit
from chainfed_ray.model.adapters import LORA_SCALE, AdapterStack, Tensors
from chainfed_ray.reading import NF4, trouble_behind
from chainfed_ray.record import VERSION

PEFT_TYPE, LORA = "CHAINFED", "LORA"
CAUSAL_LM = "CAUSAL_LM"  # PEFT's name for the task of a language model
FEATURES = "FEATURE_EXTRACTION"  # and for that of an encoder, whose hidden states a head of ours reads
# The names of a SequenceClassifier's base model and head, and of the containers of trained parts in PEFT's layers.
BASE, HEAD = "base", "head"
ADAPTERS, HEADS = "chainfed_adapters", "chainfed_heads"

KEPT = frozenset({"best", "last"})  # the names of stacks beside the model
_CONFIG, _WEIGHTS, _OWN = "adapter_config.json", "adapter_model.safetensors", "chainfed.json"
_HEAD = "head.safetensors"
_ROOT = "base_model.model"
_READ = (1, VERSION)  # stacks of version 1 are the same; the records of jobs are what has changed since


@dataclass(frozen=True)
class SavedStack:
    """A stack, and what is needed to use it: its classes, its maximum length, its base model, and the path of the layers there.

    ``round`` is the round after which it was committed, counted from 0; None if its job had none.
    ``run_layers`` is how many of the base model's layers run, the lowest ones, if the stack is of an early exit; None: all.
    ``layers_path`` is a path in the base model. For a language model's stack it is a path in the causal model, such as
    ``model.layers``, and ``classes`` is empty.
    """

    stack: AdapterStack
    classes: tuple[str, ...]
    max_length: int
    base: str
    layers_path: str
    round: int | None = None
    run_layers: int | None = None

    @property
    def modules(self) -> list[str]:
        """The paths of the modules that have an adapter, and of a ``SequenceClassifier``'s head."""
        layers = [f"{self._layers}.{layer}" for layer in self.stack.layers]
        return layers if self.stack.head is None else [*layers, HEAD]

    def config(self) -> dict[str, Any]:
        """The content of PEFT's ``adapter_config.json``."""
        return self._lora_config() if self.stack.is_lora else self._own_config()

    def _lora_config(self) -> dict[str, Any]:
        """That of a plain LoRA. PEFT finds the layers by the name that is before their index."""
        loras = {layer: self.stack.lora(layer) for layer in self.stack.layers}
        rank = next(iter(loras.values())).rank
        # Other layers may have modules of the same names: those of pictures, or an encoder's decoder.
        if "language_model" in self.layers_path or self.classes:
            paths = [f"{self.layers_path}.{layer}.{path}" for layer, lora in loras.items() for path in lora.paths]
            modules: dict[str, Any] = {"target_modules": sorted(paths)}
        else:
            names = {path.rpartition(".")[2] for lora in loras.values() for path in lora.paths}
            pattern = self.layers_path.rpartition(".")[2]
            modules = {"target_modules": sorted(names), "layers_to_transform": list(loras), "layers_pattern": pattern}
        return {
            "peft_type": LORA,
            "task_type": FEATURES if self.classes else CAUSAL_LM,
            "base_model_name_or_path": self._base_for_others(),
            "inference_mode": True,
            "revision": self.revision,
            "r": rank,
            "lora_alpha": LORA_SCALE * rank,
            "lora_dropout": 0.0,
            "bias": "none",
            **modules,
        }

    @property
    def revision(self) -> str | None:
        """The revision of a base model on the Hugging Face hub, if the job gave one."""
        scheme, _, name = self.base.removesuffix(NF4).partition(":")
        return (name.partition("@")[2] or None) if scheme == "hf" else None

    def own(self) -> dict[str, Any] | None:
        """What is beside a plain LoRA; None if ``config`` has it all."""
        if not self.stack.is_lora:
            return None
        own = {"version": VERSION, "base": self.base, "layers_path": self.layers_path, "max_length": self.max_length}
        if self.classes:
            own |= {"classes": list(self.classes), "head_layers": self.stack.head_layers}
        return own | self._which()

    def _which(self) -> dict[str, int]:
        """Which stack of its job it is."""
        which = {"round": self.round, "run_layers": self.run_layers}
        return {name: value for name, value in which.items() if value is not None}

    def _own_config(self) -> dict[str, Any]:
        down = self.stack.adapter(self.stack.layers[0]).down
        return {
            "peft_type": PEFT_TYPE,
            "version": VERSION,
            **({"task_type": CAUSAL_LM} if self.stack.head is None else {}),
            "base_model_name_or_path": self._base_for_others(),
            "base": self.base,
            "inference_mode": True,
            "target_modules": self.modules,
            "hidden": down.in_features,
            "bottleneck": down.out_features,
            "classes": list(self.classes),
            "head_layers": self.stack.head_layers,
            "max_length": self.max_length,
            **self._which(),
        }

    def tensors(self) -> Tensors:
        """Every tensor of ``adapter_model.safetensors``, by PEFT's name."""
        beside = self.head_tensors().keys()
        return {
            self._name(name): tensor
            for name, tensor in self.stack.tensors().items()
            if name.removeprefix(f"{HEAD}.") not in beside
        }

    def head_tensors(self) -> Tensors:
        """The tensors of the head, if they are in a file of their own: it is beside a plain LoRA."""
        return self.stack.head.state_dict() if self.stack.is_lora and self.stack.head else {}

    @property
    def _layers(self) -> str:
        """The path of the layers in the model that the stack is put on."""
        plain = self.stack.is_lora or self.stack.head is None
        return self.layers_path if plain else f"{BASE}.{self.layers_path}"

    def _base_for_others(self) -> str | None:
        """The base model's name on the Hugging Face hub, or its path; None for a model that comes with a package."""
        scheme, _, name = self.base.removesuffix(NF4).partition(":")
        if scheme == "builtin":
            return None
        return name.partition("@")[0] if scheme == "hf" else name  # a folder may have an @ in its name

    def _name(self, name: str) -> str:
        kind, _, rest = name.partition(".")
        if kind == "head":
            return f"{_ROOT}.{HEAD}.{HEADS}.{rest}"
        layer, _, parameter = rest.partition(".")
        inside = "" if self.stack.is_lora else f"{ADAPTERS}."
        return f"{_ROOT}.{self._layers}.{layer}.{inside}{parameter}"


def save_stack(saved: SavedStack, folder: Path) -> None:
    """Write ``folder`` as a whole. A process that is killed at any moment leaves ``load_stack`` the old stack or the new one.

    A folder cannot replace another in one step, so the old one is first put where ``load_stack`` looks if there is no other.
    """
    aside, before = folder.with_name(f"{folder.name}.partial"), _before(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    _write(aside / _WEIGHTS, save(saved.tensors(), metadata={"format": "pt"}))
    _write(aside / _CONFIG, json.dumps(saved.config(), indent=2).encode())
    if own := saved.own():
        _write(aside / _OWN, json.dumps(own, indent=2).encode())
    if head := saved.head_tensors():
        _write(aside / _HEAD, save(head, metadata={"format": "pt"}))
    if folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    aside.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


def save_models(models: Mapping[str, SavedStack], served: str, folder: Path) -> None:
    """Write the stack called ``served`` as ``folder``/model, and each other stack in ``folder`` by its own name."""
    for name, saved in models.items():
        save_stack(saved, folder / ("model" if name == served else name))
    _remove(folder, KEPT - (models.keys() - {served}))  # what they had by their own names while the job trained


def save_so_far(models: Mapping[str, SavedStack], folder: Path) -> None:
    """Write each stack of a job that trains in ``folder`` by its name; the best one first, as it may be the last no more."""
    for name in sorted(models):
        save_stack(models[name], folder / name)
    _remove(folder, KEPT - models.keys())


def exit_folder(folder: Path, layers: int) -> Path:
    """Where in the ``folder`` of a job the stack of its early exit after ``layers`` layers is."""
    return folder / f"exit-{layers}"


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)


def load_stack(folder: Path) -> SavedStack:
    """Read a folder that ``save_stack`` wrote; or PEFT's ``save_pretrained``, if the adapters are bottlenecks.

    Raises:
        CorruptCommit: the folder is missing, has another version, or lacks tensors that its configuration names.
    """
    if not folder.exists() and _before(folder).exists():
        folder = _before(folder)  # who was writing the new one was killed
    try:
        config = json.loads((folder / _CONFIG).read_bytes())
        plain_lora = config.get("peft_type") == LORA
        if plain_lora and not (folder / _OWN).exists():
            raise CorruptCommit(str(folder), f"a LoRA without the {_OWN} that chainfed-ray writes beside it")
        own = json.loads((folder / _OWN).read_bytes()) if plain_lora else config
        version = own.get("version")
        if version not in _READ:
            expected = f"it has version {version}; this chainfed-ray reads versions {_READ[0]} to {_READ[-1]}"
            raise CorruptCommit(str(folder), expected)
        tensors = load((folder / _WEIGHTS).read_bytes())
        if plain_lora:
            head = load((folder / _HEAD).read_bytes()) if "classes" in own else {}
            return _lora_of(own, config, tensors, head)
        layers = [module for module in config["target_modules"] if module != HEAD]
        path = layers[0].rpartition(".")[0]
        causal = config.get("task_type") == CAUSAL_LM
        if not causal:
            path = path.removeprefix(f"{BASE}.")
        stack = AdapterStack.from_tensors({_plain(name): tensor for name, tensor in tensors.items()})
        saved = SavedStack(
            stack, tuple(config["classes"]), config["max_length"], config["base"], path, *_which_of(config)
        )
        complete = (
            causal == (stack.head is None)
            and config["head_layers"] == stack.head_layers
            and sorted(saved.modules) == sorted(config["target_modules"])
            and saved.tensors().keys() == tensors.keys()
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        if trouble := trouble_behind(error):
            raise trouble from None
        raise CorruptCommit(
            str(folder), f"it holds no stack that can be read ({type(error).__name__}: {error})"
        ) from None
    if not complete:
        raise CorruptCommit(str(folder), "its adapters are not those that its configuration names")
    return saved


def _lora_of(own: Mapping[str, Any], config: Mapping[str, Any], tensors: Tensors, head: Tensors) -> SavedStack:
    """The stack of a plain LoRA, whose tensors have PEFT's names. ``head`` has those of a classifier's head.

    Raises:
        ValueError: the tensors are not those that ``config`` names.
    """
    before = f"{_ROOT}.{own['layers_path']}."
    stack = AdapterStack.from_tensors(
        {f"adapters.{name.removeprefix(before)}": tensor for name, tensor in tensors.items()}
        | {f"{HEAD}.{name}": tensor for name, tensor in head.items()}
    )
    classes = tuple(own.get("classes", ()))
    saved = SavedStack(stack, classes, own["max_length"], own["base"], own["layers_path"], *_which_of(own))
    whole = saved.tensors().keys() == tensors.keys() and own.get("head_layers", 1) == stack.head_layers
    named = (found.get("layers_to_transform", found["target_modules"]) for found in (saved.config(), config))
    if not whole or len({str(given) for given in named}) > 1:
        raise ValueError("its tensors are not those that its configuration names")
    return saved


def _which_of(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The round and the layers of a stack, as they stand in its configuration."""
    return config.get("round"), config.get("run_layers")


def stored_bytes(folder: Path) -> int:
    """The bytes of the tensors in a folder that ``save_stack`` wrote; 0 if there is none."""
    total = 0
    for name in (_WEIGHTS, _HEAD):
        with suppress(OSError):
            total += (folder / name).stat().st_size
    return total


def _before(folder: Path) -> Path:
    """Where the old stack is while a new one takes its place."""
    return folder.with_name(f"{folder.name}.before")


def _plain(name: str) -> str:
    """PEFT's name → the stack's own name."""
    module, marker, parameter = name.rpartition(f".{ADAPTERS}.")
    if marker:
        return f"adapters.{module.rpartition('.')[2]}.{parameter}"
    return f"head.{name.rpartition(f'.{HEADS}.')[2]}"


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
