"""Registers the project's adapters as a PEFT method, so that PEFT can load a finished stack. Importing this file is enough. ::

    from peft import PeftModel
    from chainfed_ray.serving.peft_method import SequenceClassifier

    model = PeftModel.from_pretrained(SequenceClassifier.from_folder(base_folder), "jobs/<job>/model")
    logits = model(input_ids=ids, attention_mask=mask)  # [B, C]

Layers with an adapter, and the head, are PEFT layers. Several stacks can be loaded side by side, each with its own classes. A
batch may name a stack for each row (``adapter_names=``), if these stacks have the same number of classes.

The stack of a language model is loaded on the causal model itself. The model's own head gives the logits [B, T, V], and its
``generate`` writes text. ::

    model = PeftModel.from_pretrained(load_whole(AutoModelForCausalLM, base_folder), "jobs/<job>/model")
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn
from transformers import AutoModel

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.model.adapters import Adapter, Head
from chainfed_ray.model.forward import through_whole
from chainfed_ray.model.saved_stack import ADAPTERS, HEAD, HEADS, PEFT_TYPE
from chainfed_ray.model.source import load_whole
from chainfed_ray.model.trunk import TOKENS_FIRST, find_layers, text_part
from chainfed_ray.record import VERSION

_PREFIX = "chainfed_"
_NO_ADAPTER = "__base__"  # PEFT's name for a row that is to pass without an adapter


class SequenceClassifier(nn.Module):
    """A base model, in ``base``, and a place for a head. A classifier's stack is loaded on it, and brings the head.

    Without a stack there is no head, so ``forward`` raises ``RuntimeError``.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.head = _NoHead()
        self._layers_path = find_layers(base, type(base).__name__)
        self._reader_path = text_part(base)
        config: Any = base.get_submodule(self._reader_path).config
        layers: Any = base.get_submodule(self._layers_path)
        if config.model_type in TOKENS_FIRST or len(layers) != config.num_hidden_layers:
            # XLNet has tokens before examples; ALBERT's layers are one module, which would have one adapter for all its uses.
            raise UnsupportedModel(type(base).__name__, "PEFT cannot put adapters between its layers; the service can")

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype = torch.float32) -> "SequenceClassifier":
        """The base model in ``folder``, frozen and in evaluation mode."""
        return cls(load_whole(AutoModel, folder, dtype)).eval().requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask [B, T] → logits [B, C]."""
        layers: Any = self.base.get_submodule(self._layers_path)
        reader = self.base.get_submodule(self._reader_path)
        states = through_whole(reader, layers, {}, input_ids, attention_mask)  # the layers have their adapters
        logits: Tensor = self.head(states.hidden, attention_mask, states.pooled)
        return logits


@dataclass
class ChainFedConfig(PeftConfig):
    """What PEFT saves with a stack: its sizes, its base model and its classes.

    ``target_modules`` names the layers with an adapter and, for a classifier, the head. ``head_layers`` is the number of
    layers whose pooled outputs are the head's features. ``classes`` is empty for a language model.
    """

    version: int = VERSION
    target_modules: list[str] = field(default_factory=list)
    base: str | None = None
    hidden: int = 0
    bottleneck: int = 0
    classes: list[str] = field(default_factory=list)
    head_layers: int = 1
    max_length: int = 128
    round: int | None = None
    run_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.run_layers is not None:
            reason = (
                f"an early exit after {self.run_layers} layers, and PEFT runs them all; the service answers with it"
            )
            raise UnsupportedModel("the stack", reason)
        self.peft_type = getattr(PeftType, PEFT_TYPE)


class _ChainFedModule(nn.Module, BaseTunerLayer):
    """The base of our two PEFT layers. It holds a part (an adapter or a head) for each loaded stack, by its name."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._adapter_names: Sequence[str] | None = None
        self._disable_adapters = False
        self.merged_adapters = []
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())

    @property
    def _parts(self) -> nn.ModuleDict:
        parts: nn.ModuleDict = getattr(self, self.adapter_layer_names[0])
        return parts

    def update_layer(self, adapter_name: str, part: nn.Module, active: list[str]) -> None:
        """Add ``part`` for the stack ``adapter_name``, on the device of the base layer, and activate the stacks ``active``."""
        parameter = next(self.base_layer.parameters(), None)
        self._parts[adapter_name] = part if parameter is None else part.to(parameter.device)
        self.set_adapter(active)

    def _by_part(self, hidden: Tensor) -> list[tuple[nn.Module | None, Tensor]]:
        """Pairs of a part and the rows of ``hidden`` [B, …] that pass through it. A part of None leaves its rows unchanged."""
        rows = torch.arange(len(hidden), device=hidden.device)
        if self._adapter_names is None:
            active = [name for name in self.active_adapters if name in self._parts]
            return [(None if self.disable_adapters or not active else self._parts[active[0]], rows)]
        if len(self._adapter_names) != len(hidden):
            raise ValueError(f"adapter_names has {len(self._adapter_names)} names for {len(hidden)} rows")
        return [
            (
                self._parts[name] if name in self._parts else None,  # noqa: SIM401  a ModuleDict has no get
                rows[[place for place, given in enumerate(self._adapter_names) if given == name]],
            )
            for name in dict.fromkeys(self._adapter_names)
        ]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise ``NotImplementedError``: a bottleneck has a nonlinearity, so it cannot be added to the weights."""
        raise NotImplementedError("a ChainFed adapter cannot be merged into its base model")

    def unmerge(self) -> None:
        """Do nothing, because nothing is ever merged."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # some models read attributes of their layers


class ChainFedLayer(_ChainFedModule):
    """A layer of the base model, and the adapters of all loaded stacks that follow it."""

    adapter_layer_names = (ADAPTERS,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, with each row's adapter applied to the output [B, T, D]."""
        output = self.base_layer(*args, **kwargs)
        if isinstance(output, tuple):
            return (self._adapted(output[0]), *output[1:])
        return self._adapted(output)

    def _adapted(self, hidden: Tensor) -> Tensor:
        parts = self._by_part(hidden)
        if len(parts) == 1:
            return hidden if parts[0][0] is None else parts[0][0](hidden)
        adapted = hidden.clone()
        for part, rows in parts:
            if part is not None:
                adapted[rows] = part(hidden[rows])
        return adapted


class ChainFedHead(_ChainFedModule):
    """The heads of all loaded stacks."""

    adapter_layer_names = (HEADS,)

    def forward(self, hidden: Tensor, mask: Tensor, below: Tensor) -> Tensor:
        """Hidden [B, T, D], mask [B, T] and pooled features of the layers ``below`` [B, r, D] → logits [B, C].

        Each row passes through the head of its own stack.
        """
        parts = [(part or self.base_layer, rows) for part, rows in self._by_part(hidden)]
        logits = [part(hidden[rows], mask[rows], below[rows]) for part, rows in parts]
        return torch.cat(logits)[torch.cat([rows for _, rows in parts]).argsort()]


class ChainFedModel(BaseTuner):
    """The PEFT tuner for a ``ChainFedConfig``: it puts the parts of a stack into the model."""

    prefix = _PREFIX
    tuner_layer_cls = _ChainFedModule
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  the name and the type are PEFT's

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        return isinstance(peft_config, ChainFedConfig) and key in peft_config.target_modules

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Remove the stack's name from ``key``: ``….chainfed_adapters.<stack>.down.weight`` is saved without it."""
        for parts in (ADAPTERS, HEADS):
            key = key.replace(f".{parts}.{adapter_name}.", f".{parts}.")
        return key

    def _create_and_replace(  # type: ignore[override]  # PEFT's own takes parameters to replace; a stack replaces none
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        assert isinstance(peft_config, ChainFedConfig)
        if current_key == HEAD:
            part: nn.Module = Head(peft_config.hidden, len(peft_config.classes), peft_config.head_layers)
            wrapper: type[_ChainFedModule] = ChainFedHead
        else:
            part, wrapper = Adapter(peft_config.hidden, peft_config.bottleneck, seed=0), ChainFedLayer
        if not isinstance(target, wrapper):
            target = wrapper(target)
            setattr(parent, target_name, target)
        target.update_layer(adapter_name, part, self.active_adapters)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put ``new_module`` in the place of ``child``, as ``unload`` does with the layers of the base model.

        PEFT's own method would also look for the weight of ``new_module``; a layer has many.
        """
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """For one forward pass, tell the layers which stack each row belongs to.

        Raises:
            ValueError: ``adapter_names`` has a name under which no stack is loaded.
        """
        names: Sequence[str] | None = kwargs.get("adapter_names")
        unknown = sorted(set(names or ()) - self.peft_config.keys() - {_NO_ADAPTER})
        if unknown:
            raise ValueError(f"no adapter is called {unknown[0]!r}; there are {', '.join(self.peft_config)}")
        layers = [module for module in self.modules() if isinstance(module, _ChainFedModule)]
        for layer in layers:
            layer._adapter_names = names
        try:
            yield
        finally:
            for layer in layers:
                layer._adapter_names = None


class _NoHead(nn.Module):
    """Holds the place of the head until a stack is loaded."""

    def forward(self, hidden: Tensor, mask: Tensor, below: Tensor) -> Tensor:
        """Raise ``RuntimeError``: there is no head yet."""
        raise RuntimeError("no stack is active on this SequenceClassifier: load one with PeftModel.from_pretrained")


def _register() -> None:
    """Add the method to PEFT's list.

    PEFT's enum of methods cannot be extended, so the member is written into its internals. The version of peft is pinned.
    """
    if PEFT_TYPE in PeftType.__members__:
        return
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
    setattr(PeftType, PEFT_TYPE, member)
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=ChainFedConfig, model_cls=ChainFedModel, prefix=_PREFIX)


_register()
