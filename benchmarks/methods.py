"""The methods that the accuracy benchmark compares. Each is a kind of training, and changes to a job's document."""

from dataclasses import dataclass, field
from typing import Any, Literal

Document = dict[str, Any]
Kind = Literal["chain", "lora", "probe", "fitted", "none"]
Part = Literal["budgets", "anyone", "able"]

END_TO_END = "end-to-end"
UNTRAINED = ("none", "fitted")  # kinds without rounds or rates

# Learning rates, chosen on validation rows. The option --rates tries others, the same for every method.
_ADAPTERS, _HEAD, _FITTED, _PROBE, _LORA = 1e-2, 0.1, 1e-2, 0.3, 1e-2
_WHOLE_HEAD = 0.03  # of a head that is trained with adapters after every layer

# The paper's method. All its keys are given here, so that it stays the same if the defaults of a job change.
_CHAIN: Document = {
    "window": 2,
    "schedule": "staged",
    "start": "auto",
    "cka_threshold": 0.8,
    "head": "zero",
    "global_weight": 0.1,
    "global_trains": "head",
    "adapter": {"bottleneck": 64},
}
_FEDAVG: Document = {"rule": "mean", "optimizer": "none", "proximal": 0.0}


@dataclass(frozen=True)
class Method:
    """A method: ``changes`` to the job's document, and learning ``rates`` (adapters, head), None for those of ``JobSpec``.

    ``part`` says which clients take part: ``budgets``, the clients whose budget is enough; ``anyone``, all clients, with
    unlimited memory; ``able``, only the class of clients that can hold the whole model.
    """

    name: str
    rates: tuple[float, float] | None = (_ADAPTERS, _HEAD)
    kind: Kind = "chain"
    part: Part = "budgets"
    changes: Document = field(default_factory=dict)

    @property
    def follows_defaults(self) -> bool:
        """True if the method uses the defaults of ``JobSpec``. Its rows are valid only for the defaults with which they ran."""
        return "aggregation" not in self.changes


def methods(layers: int, recipe_rates: tuple[float, float] | None = None) -> dict[str, Method]:
    """Every method by name, for a base model with ``layers`` layers.

    The recommended recipe has ``recipe_rates``, or the rates of ``JobSpec`` if they are None.
    """
    whole = _paper(window=layers, start=0, global_weight=0.0)
    top = layers - _CHAIN["window"]
    starts = range(top + 1)
    made = [
        Method("none", rates=None, kind="none", changes=_top_layer(layers)),
        Method("fitted", rates=None, kind="fitted", changes=_with_head(_top_layer(layers), "fitted")),
        Method("probe", rates=(_ADAPTERS, _PROBE), kind="probe", changes=_top_layer(layers)),
        Method(END_TO_END, rates=(_ADAPTERS, _WHOLE_HEAD), part="anyone", changes=whole),
        Method("end-to-end-fitted", rates=(_ADAPTERS, _FITTED), part="anyone", changes=_with_head(whole, "fitted")),
        Method("end-to-end-able", rates=(_ADAPTERS, _WHOLE_HEAD), part="able", changes=whole),
        Method("lora-able", rates=(_LORA, _HEAD), kind="lora", part="able", changes=whole),
        Method("last-window", changes=_paper(start=top)),
        *(Method(f"start-{start}", changes=_paper(start=start)) for start in starts),
        Method("chain-staged", changes=_paper()),
        Method("chain-cyclic", changes=_paper(schedule="cyclic")),
        Method("no-dlct", changes=_paper(window=1)),
        Method("no-gpo", changes=_paper(global_weight=0.0)),
        Method("no-foat", changes=_paper(start=0)),
        Method("recommended", rates=recipe_rates),
        Method("recommended-best-exit", rates=recipe_rates, changes={"chain": {"start": "best-exit"}}),
        Method("recommended-reads-1", rates=recipe_rates, changes={"chain": {"head_layers": 1}}),
        *(
            Method(f"recommended-start-{start}", rates=recipe_rates, changes={"chain": {"start": start}})
            for start in starts
        ),
        *(
            Method(
                f"recommended-exact-start-{start}",
                rates=recipe_rates,
                changes={"chain": {"start": start, "look_ahead": "exact"}},
            )
            for start in starts[:-1]
        ),
    ]
    return {method.name: method for method in made}


AUTOMATIC = {
    "chain-staged": "start-",
    "recommended": "recommended-start-",
    "recommended-best-exit": "recommended-start-",
}
"""The methods that find their start layer themselves. Each maps to the beginning of the names of the same method with a fixed
start."""


def _paper(**changes: Any) -> Document:
    return {"chain": {**_CHAIN, **changes}, "rounds": {"last_stage_share": 0.5}, "aggregation": _FEDAVG}


def _with_head(changes: Document, head: str) -> Document:
    return merged(changes, {"chain": {"head": head}})


def _top_layer(layers: int) -> Document:
    """The changes for methods on the frozen model alone. A job must have a window; this one is at the top and not trained."""
    return _paper(window=1, start=layers - 1)


def merged(document: Document, changes: Document) -> Document:
    """A copy of ``document`` with ``changes``. Sections are merged key by key."""
    result = dict(document)
    for key, value in changes.items():
        result[key] = merged(result[key], value) if isinstance(value, dict) and key in result else value
    return result
