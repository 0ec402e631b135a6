"""The server's optimizer: it takes the change of the round's aggregate as a pseudo-gradient Δ, and steps the stack x by it.

The optimizers are FedAvgM (Hsu et al., 2019), FedAdam and FedYogi (Reddi et al., 2021, algorithm 2; no bias correction)::

    momentum   m ← β₁ m + Δ                                                             x ← x + η m
    adam       m ← β₁ m + (1 − β₁) Δ     v ← β₂ v + (1 − β₂) Δ²                         x ← x + η m / (√v + τ)
    yogi       m ← β₁ m + (1 − β₁) Δ     v ← v − (1 − β₂) Δ² sign(v − Δ²)               x ← x + η m / (√v + τ)

m starts at 0 and v at τ². All operations are on single values, in float32.
"""

from collections.abc import Iterable

from torch import Tensor, full_like, zeros_like

from chainfed_ray.model.adapters import Tensors
from chainfed_ray.spec.sections import AggregationSpec

_MOMENTUM_RATE, _ADAPTIVE_RATE = 1.0, 0.01


class ServerOptimizer:
    """The optimizer that the job names. With ``none``, the aggregate itself is the new stack.

    ``tensors`` holds the state, ``m.<name>`` and ``v.<name>`` of each tensor. It is committed with the stack, so that a resumed
    job continues from it. The state of a tensor does not change while the window is elsewhere.
    """

    def __init__(self, spec: AggregationSpec, tensors: Tensors | None = None) -> None:
        self._spec = spec
        self.tensors: Tensors = tensors or {}

    def forget(self, names: Iterable[str]) -> None:
        """Delete the state of the tensors ``names``, which have new initial values."""
        for name in names:
            self.tensors.pop(f"m.{name}", None)
            self.tensors.pop(f"v.{name}", None)

    def step(self, before: Tensors, aggregate: Tensors) -> Tensors:
        """The tensors after the round. Those of ``before`` that are not in ``aggregate`` were not trained and do not change."""
        if self._spec.optimizer == "none":
            return before | aggregate
        return before | {name: before[name] + self._move(name, new - before[name]) for name, new in aggregate.items()}

    def _move(self, name: str, change: Tensor) -> Tensor:
        """The step of the tensor called ``name`` for the pseudo-gradient ``change``."""
        spec, rate = self._spec, self._rate
        momentum = self.tensors.get(f"m.{name}", zeros_like(change))
        if spec.optimizer == "momentum":
            self.tensors[f"m.{name}"] = momentum = spec.beta1 * momentum + change
            return rate * momentum
        second = self.tensors.get(f"v.{name}", full_like(change, spec.tau**2))
        square = change.square()
        momentum = spec.beta1 * momentum + (1 - spec.beta1) * change
        if spec.optimizer == "adam":
            second = spec.beta2 * second + (1 - spec.beta2) * square
        else:
            second = second - (1 - spec.beta2) * square * (second - square).sign()
        self.tensors[f"m.{name}"], self.tensors[f"v.{name}"] = momentum, second
        return rate * momentum / (second.sqrt() + spec.tau)

    @property
    def _rate(self) -> float:
        default = _MOMENTUM_RATE if self._spec.optimizer == "momentum" else _ADAPTIVE_RATE
        return default if self._spec.server_learning_rate is None else self._spec.server_learning_rate
