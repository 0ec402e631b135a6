"""A base model and a stack as one Transformers model. Importing this file is enough to load its folders. ::

    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
    logits = model(input_ids=ids, attention_mask=mask).logits  # [B, C]

A language model is loaded with ``AutoModelForCausalLM``, and its ``generate`` writes text. Neither needs PEFT.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import SequenceClassifierOutput

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.forward import adapt, through_whole
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.model.trunk import TOKENS_FIRST, find_layers, text_part


class WholeConfig(PreTrainedConfig):
    """The configuration of a base model with a stack. It holds the base model's own configuration.

    ``layers`` are those with an adapter. The classes are ``id2label``, as in any classifier; a language model has none.
    """

    model_type = "chainfed"
    sub_configs_defaults = {"base_config": SubConfigSpec(AutoConfig, model_type="bert")}  # noqa: RUF012  the name is theirs

    base_config: dict[str, Any] | PreTrainedConfig | None = None
    layers: list[int] | None = None
    hidden: int = 0
    bottleneck: int = 0
    head_layers: int = 1
    max_length: int = 128

    @classmethod
    def of(cls, saved: SavedStack, base: PreTrainedConfig) -> "WholeConfig":
        """The configuration of ``saved`` on the base model that is configured by ``base``."""
        stack = saved.stack
        given: dict[str, Any] = {"head_layers": stack.head_layers, "max_length": saved.max_length}
        if stack.layers:
            down = stack.adapter(stack.layers[0]).down
            given |= {"hidden": down.in_features, "bottleneck": down.out_features}
        elif stack.head:  # its LoRAs are in the weights
            given |= {"hidden": stack.head.norm.weight.shape[0]}
        if saved.classes:
            given["id2label"] = dict(enumerate(saved.classes))
            given["label2id"] = {name: number for number, name in enumerate(saved.classes)}
        return cls(base_config=base, layers=list(stack.layers), **given)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The configuration of the base model's part that reads texts."""
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)  # type: ignore[union-attr]

    def new_stack(self, classes: int | None) -> AdapterStack:
        """A stack of these sizes, whose values are those of a stack before training."""
        return AdapterStack.new(self.layers or [], self.hidden, self.bottleneck, classes, 0, self.head_layers)


class _Whole(PreTrainedModel):
    """What both models share. Adapters and head stay in float32 whatever the base model's dtype is."""

    config_class = WholeConfig
    base_model_prefix = "base"
    _keep_in_fp32_modules_strict = ["stack"]  # noqa: RUF012  the name is theirs
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: WholeConfig, base: PreTrainedModel, classes: int | None) -> None:
        super().__init__(config)
        self.base, self.stack = base, config.new_stack(classes)
        self._layers_path = find_layers(base, type(base).__name__)

    @property
    def _layers(self) -> Any:
        return self.base.get_submodule(self._layers_path)


class WholeClassifier(_Whole):
    """A classifier: a base model, its adapters and its head. Without a ``base`` a new one is made.

    The stack is as before training: ``post_init`` would draw new values for weights that were not loaded by Transformers.

    Raises:
        UnsupportedModel: the layers cannot be told apart, or have tokens before examples.
    """

    def __init__(self, config: WholeConfig, base: PreTrainedModel | None = None) -> None:
        base = base or AutoModel.from_config(config.base_config)
        super().__init__(config, base, config.num_labels)
        self._reader_path = text_part(base)
        reader: Any = base.get_submodule(self._reader_path)
        if reader.config.model_type in TOKENS_FIRST or len(self._layers) != reader.config.num_hidden_layers:
            raise UnsupportedModel(
                type(base).__name__, "its layers cannot be hooked one by one; the service can run it"
            )
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_unused: Any
    ) -> SequenceClassifierOutput:
        """Token ids and mask [B, T], padded on the right → logits [B, C]."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        reader = self.base.get_submodule(self._reader_path)
        adapters = {layer: self.stack.adapter(layer) for layer in self.stack.layers}
        states = through_whole(reader, self._layers, adapters, input_ids, mask)
        assert self.stack.head is not None, "a classifier's stack has a head"
        return SequenceClassifierOutput(logits=self.stack.head(states.hidden, mask, states.pooled))


class WholeLanguageModel(_Whole, GenerationMixin):
    """A causal language model and its adapters. Without a ``base`` a new one is made. The stack is as before training."""

    def __init__(self, config: WholeConfig, base: PreTrainedModel | None = None) -> None:
        base = base or AutoModelForCausalLM.from_config(config.base_config)
        super().__init__(config, base, None)
        for layer in self.stack.layers:
            self._layers[layer].register_forward_hook(partial(adapt, self.stack.adapter(layer)))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> Any:
        """What the base model's own forward gives, with the adapters after its layers: logits [B, T, V]."""
        return self.base(input_ids=input_ids, **given)

    def generate(  # type: ignore[override]
        self, inputs: Tensor | None = None, generation_config: Any = None, **given: Any
    ) -> Any:
        """The base model's own ``generate``: its layers have the adapters, and it keeps its own cache."""
        self.base.generation_config = self.generation_config  # the one that was loaded, or changed since
        return self.base.generate(inputs, generation_config, **given)  # type: ignore[operator]


AutoConfig.register(WholeConfig.model_type, WholeConfig)
AutoModelForSequenceClassification.register(WholeConfig, WholeClassifier)
AutoModelForCausalLM.register(WholeConfig, WholeLanguageModel)
