"""Two sets of defaults for a job: ours, which are the schema's own, and the paper's. What a job says itself always counts.

A few of ours follow from what a job says elsewhere: a language model's, and the rate of a head that has everything to learn.

What each of them learns is measured by ``python -m benchmarks accuracy``.
"""

from collections.abc import Mapping
from typing import Any, Literal

Recipe = Literal["chainfed-ray", "paper"]

# ChainFed (Wu et al., 2026): a head that is trained from zero, both losses, the start where CKA falls below 0.8.
_PAPER: Mapping[str, Mapping[str, Any]] = {
    "chain": {"head": "zero", "cka_threshold": 0.8, "global_weight": 0.1, "global_trains": "head"},
    "rounds": {"learning_rate": 3e-3, "head_learning_rate": 0.1, "restore_best": False},
}


# A fitted head is held near to where it began; one from zero has a long way to go.
_FROM_ZERO: Mapping[str, Mapping[str, Any]] = {"rounds": {"head_learning_rate": 0.1}}

# A language model brings its head, and its hidden states are those that the head was trained on.
_CAUSAL: Mapping[str, Mapping[str, Any]] = {
    "chain": {"head": "model"},
    "rounds": {"learning_rate": 1e-3, "clip_norm": 1.0},
}


def with_defaults_of(document: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """``document`` with the defaults of its recipe and of its task filled in; whatever is wrong with it stays as it is."""
    model = document.get("model")
    causal = isinstance(model, Mapping) and model.get("task") == "causal-lm"
    filled = _filled(document, _CAUSAL) if causal else document
    if document.get("recipe") == "paper":
        return _filled(filled, _PAPER)
    chain = document.get("chain")
    from_zero = isinstance(chain, Mapping) and chain.get("head") == "zero"
    return _filled(filled, _FROM_ZERO) if from_zero else filled


def _filled(document: Mapping[Any, Any], defaults: Mapping[str, Mapping[str, Any]]) -> Mapping[Any, Any]:
    filled = dict(document)
    for section, values in defaults.items():
        given = document.get(section, {})
        if isinstance(given, Mapping):
            filled[section] = {**values, **given}
    return filled
