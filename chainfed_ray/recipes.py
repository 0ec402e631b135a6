"""Two sets of defaults for a job: ours, which are the schema's own, and the paper's. What a job says itself always counts.

What each of them learns is measured by ``python -m benchmarks accuracy``.
"""

from collections.abc import Mapping
from typing import Any, Literal

Recipe = Literal["chainfed-ray", "paper"]

# ChainFed (Wu et al., 2026): a head that is trained from zero, both losses, the start where CKA falls below 0.8.
_PAPER: Mapping[str, Mapping[str, Any]] = {
    "chain": {"head": "zero", "cka_threshold": 0.8, "global_weight": 0.1, "global_trains": "head"},
    "rounds": {"learning_rate": 3e-3, "head_learning_rate": 0.1},
}


def with_defaults_of(document: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """``document`` with the defaults of the recipe that it names filled in; whatever is wrong with it stays as it is."""
    if document.get("recipe") != "paper":
        return document
    filled = dict(document)
    for section, defaults in _PAPER.items():
        given = document.get(section, {})
        if isinstance(given, Mapping):
            filled[section] = {**defaults, **given}
    return filled
