"""The defaults of a job that depend on its recipe (ours or the paper's), its task or its head.

The schema has our defaults; this file has the ones that differ. A value that the job gives itself always wins.
``python -m benchmarks accuracy`` measures what each recipe learns.
"""

from collections.abc import Mapping
from typing import Any, Literal

Recipe = Literal["chainfed-ray", "paper"]

# ChainFed (Wu et al., 2026): a head that is trained from zero, both losses, and a chain that starts where CKA falls below 0.8.
_PAPER: Mapping[str, Mapping[str, Any]] = {
    "chain": {"window": 2, "head": "zero", "cka_threshold": 0.8, "global_weight": 0.1, "global_trains": "head"},
    "rounds": {"learning_rate": 3e-3, "head_learning_rate": 0.1, "restore_best": False},
}


# A fitted head is good from the start, so its default rate is low. A head that starts at zero needs a higher one.
_FROM_ZERO: Mapping[str, Mapping[str, Any]] = {"rounds": {"head_learning_rate": 0.1}}

# A language model keeps its own head, which expects the hidden states that it was trained on: so steps are small, and clipped.
_CAUSAL: Mapping[str, Mapping[str, Any]] = {
    "chain": {"head": "model"},
    "rounds": {"learning_rate": 1e-3, "clip_norm": 1.0},
}

# A deep model's upper layers gain the most for each pass, and a wide window of them more than several (benchmarks/LOG.md).
_DEEP: Mapping[str, Mapping[str, Any]] = {"chain": {"start": "last"}}

# A LoRA cannot stand in for its layer, so a window looks ahead through the layers themselves.
_LORA: Mapping[str, Mapping[str, Any]] = {"chain": {"look_ahead": "exact"}}


def with_defaults_of(document: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """``document`` with the defaults of its recipe, task and head filled in. Invalid values are left to the parser."""
    model = document.get("model")
    causal = isinstance(model, Mapping) and model.get("task") == "causal-lm"
    filled = _filled(document, _CAUSAL) if causal else document
    if _adapter_kind(document) == "lora":
        filled = _filled(filled, _LORA)
    if document.get("recipe") == "paper":
        return _filled(filled, _PAPER)
    if causal:
        filled = _filled(filled, _DEEP)
    chain = document.get("chain")
    from_zero = isinstance(chain, Mapping) and chain.get("head") == "zero"
    return _filled(filled, _FROM_ZERO) if from_zero else filled


def _adapter_kind(document: Mapping[Any, Any]) -> object:
    chain = document.get("chain")
    adapter = chain.get("adapter") if isinstance(chain, Mapping) else None
    return adapter.get("kind") if isinstance(adapter, Mapping) else None


def _filled(document: Mapping[Any, Any], defaults: Mapping[str, Mapping[str, Any]]) -> Mapping[Any, Any]:
    filled = dict(document)
    for section, values in defaults.items():
        given = document.get(section, {})
        if isinstance(given, Mapping):
            filled[section] = {**values, **given}
    return filled
