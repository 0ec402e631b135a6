"""Finds the parameters of a model in its checkpoint, by the rules of transformers' own loading.

A checkpoint may have other names than the model: a prefix, or the names of an older version. It may have a tensor for each
expert where the model has one for all, or one for queries, keys and values. Transformers knows these forms, and its rules are
used here to find tensors, not to load them: such a parameter is the bytes of several tensors in turn, or a share of one.
"""

import copy
import logging
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.problem import some_of
from chainfed_ray.streaming.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_log = logging.getLogger(__name__)
# What is ordinary to be left out: heads that predict tokens or the next sentence, poolers, and what is computed anyway.
_ORDINARY = re.compile(
    r"(^|\.)(lm_head|lm_loss|cls|embed_out|vocab_\w+|predictions|lm_predictions|mask_predictions|pred_layer|seq_relationship"
    r"|sop_classifier|generator_\w+|discriminator_predictions|final_logits_bias|pooler|mtp"
    r"|position_ids|inv_freq|masked_bias|attn\.bias|attention\.bias|rope_freqs)(\.|$)"
    r"|^decoder\.bias$|^head\.(dense|norm)\."  # ModernBERT's
)
_ADAPTER = re.compile(r"(^|[._])(lora_[A-Z]|lora_embedding_[A-Z]|lora_magnitude_vector|ia3_l|prompt_embeddings)(\.|$)")
# What libraries put beside a matrix that they have quantized, without which its numbers are others.
_QUANTIZED = re.compile(
    r"(^|\.)(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|weight_zero_point|input_scale|scales|absmax|quant_map|SCB)$"
    r"|\.quant_state\.|\.weight\.(absmax|quant_map|nested_\w+)$"
)


class StoredNames:
    """The stored name of each parameter of ``model``, which may be on the meta device. ``names`` are all that are stored.

    Ask it for names ``in_checkpoint``. A parameter that the checkpoint holds in parts is joined there when it is asked for, and
    one that it holds with others is cut from them.
    """

    _checkpoint: Checkpoint

    def __init__(self, model: "PreTrainedModel", names: Iterable[str]) -> None:
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._rules = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tied: dict[int, list[str]] = {}  # the names of one parameter
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        self._same = {name: names for names in tied.values() if len(names) > 1 for name in names}
        self._names: dict[str, str] = {}
        self._shares: dict[str, tuple[str, int, int]] = {}  # parameters that are shares of one stored tensor
        self._parts: dict[str, dict[str, list[str]]] = {}  # of a parameter, by the pattern that their names match
        self.without_place: list[str] = []  # stored tensors that are no parameter of the model
        ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        for stored in sorted(names, key=dot_natural_key):
            name, pattern = rename_source_key(
                stored, renamings, converters, model.base_model_prefix, cast(Any, self._shapes)
            )
            if pattern is None and name not in self._shapes and not any(each.search(name) for each in ignored):
                self.without_place.append(stored)
            if pattern is not None and _steps(self._rules[pattern]) == [(Chunk, 0)]:
                targets = self._rules[pattern].target_patterns
                for place, target in enumerate(targets):
                    self._shares[name.replace(targets[0], target)] = (stored, place, len(targets))
            elif pattern is not None:
                self._parts.setdefault(name, {}).setdefault(pattern, []).append(stored)
            else:
                self._names[name] = stored

    def in_checkpoint(self, checkpoint: Checkpoint) -> Self:
        """The same names, to be joined and cut in ``checkpoint``, whose names they are."""
        found = copy.copy(self)
        found._checkpoint, found._names = checkpoint, dict(self._names)
        return found

    @property
    def parts(self) -> int:
        """The number of stored tensors that are parts of a parameter. A model of many experts has thousands."""
        return sum(len(names) for by_pattern in self._parts.values() for names in by_pattern.values())

    def find(self, name: str) -> str | None:
        """The checkpoint's name for a parameter, or None.

        Raises:
            UnsupportedModel: the checkpoint has it in a form that cannot be read by byte ranges.
        """
        if name not in self._names and name in self._parts:
            self._names[name] = self._joined(name, self._parts[name])
        if name not in self._names and name in self._shares:
            self._checkpoint.cut(f"{name} (cut)", *self._shares[name], self._shapes[name])
            self._names[name] = f"{name} (cut)"
        return next((self._names[same] for same in (name, *self._same.get(name, ())) if same in self._names), None)

    def _joined(self, name: str, parts: dict[str, list[str]]) -> str:
        rule = self._rules[next(iter(parts))]
        found = [parts.get(pattern, []) for pattern in rule.source_patterns]
        if len({len(names) for names in found}) > 1:
            raise UnsupportedModel(str(self._checkpoint.folder), f"its checkpoint lacks parts of {name}")
        order = _order(rule, found)
        if order is None:
            steps = " and ".join(type(step).__name__ for step in rule.operations)
            wanted = (
                f"its checkpoint has {name} in another form ({steps} would be needed), which chainfed-ray does not read"
            )
            raise UnsupportedModel(str(self._checkpoint.folder), wanted)
        self._checkpoint.join(f"{name} (joined)", order, self._shapes[name])
        return f"{name} (joined)"


def _order(rule: WeightConverter, parts: list[list[str]]) -> list[str] | None:
    """Stored tensors in the order of their parameter's bytes, or None if the rule would move bytes within a tensor.

    ``parts`` has a list for each of the rule's patterns, such as all experts' gates and all experts' ups.
    """
    steps = _steps(rule)
    if steps == [(MergeModulelist, 0), (Concatenate, 1)]:
        return [name for expert in zip(*parts, strict=True) for name in expert]
    if steps in ([(MergeModulelist, 0)], [(Concatenate, 0)]):
        return [name for names in parts for name in names]
    return None


def _steps(rule: WeightConverter) -> list[tuple[type, int | None]]:
    """The operations of a rule, and the dimension of each."""
    return [(type(step), getattr(step, "dim", None)) for step in rule.operations]


def check_left_out(
    folder: Path, names: Collection[str], layers_path: str, layers: int, config: "PreTrainedConfig"
) -> None:
    """Say which tensors the model in ``folder`` has no place for, apart from those that many folders have: they are left out.

    Layers that predict further tokens may be stored after the model's own. Its ``config`` counts them separately.

    Raises:
        UnsupportedModel: they are of an adapter, of a quantized matrix or of a layer that the model has not. Without them, the
            model would be another one than its owner means.
    """
    left_out = [name for name in names if not _ORDINARY.search(name)]
    counts = (getattr(config, key, None) for key in ("num_nextn_predict_layers", "num_mtp_layers"))
    stored = layers + max([0, *(count for count in counts if isinstance(count, int))])
    above = re.compile(rf"(^|\.){re.escape(layers_path)}\.(\d+)\.")
    for name in left_out:
        if _ADAPTER.search(name):
            reason = f"its checkpoint has tensors of an adapter, such as {name}: merge it into the base first"
        elif _QUANTIZED.search(name):
            reason = f"its weights are quantized, by the tensor {name}; they must be float32, float16 or bfloat16"
        elif (place := above.search(name)) and int(place[2]) >= stored:
            reason = f"its configuration has {layers} layers, and its checkpoint a tensor {name}"
        else:
            continue
        raise UnsupportedModel(str(folder), reason)
    if left_out:
        words = "the folder has %d tensors that this model has no place for: %s"
        _log.warning(words, len(left_out), some_of(left_out))
