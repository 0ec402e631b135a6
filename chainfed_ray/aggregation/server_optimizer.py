"""The server's optimizer: it takes the change of the round's aggregate as a pseudo-gradient Δ, and steps the stack x by it.

The optimizers are FedAvgM (Hsu et al., 2019), FedAdam and FedYogi (Reddi et al., 2021, algorithm 2; no bias correction)::

    momentum   m ← β₁ m + Δ                                                             x ← x + η m
    adam       m ← β₁ m + (1 − β₁) Δ     v ← β₂ v + (1 − β₂) Δ²                         x ← x + η m / (√v + τ)
    yogi       m ← β₁ m + (1 − β₁) Δ     v ← v − (1 − β₂) Δ² sign(v − Δ²)               x ← x + η m / (√v + τ)

m starts at 0 and v at τ². All operations are on single values, in float32.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor, contiguous_format, full_like, zeros_like

from chainfed_ray.model.adapters import Tensors
from chainfed_ray.spec.sections import AggregationSpec

_MOMENTUM_RATE, _ADAPTIVE_RATE = 1.0, 0.01


@dataclass(frozen=True)
class ServerOptimizer:
    """The job's server optimizer, and what it remembers after a round. Without one, the aggregate is the new stack.

    It remembers ``m.<name>`` and ``v.<name>`` in ``tensors``, which are committed: a restart continues with them. The memory of
    a tensor stays as it is while other windows are trained. A step makes a new optimizer and leaves this one as it was.
    """

    spec: AggregationSpec
    tensors: Tensors = field(default_factory=dict)

    def without(self, names: Iterable[str]) -> "ServerOptimizer":
        """This optimizer without its memory of some tensors, because they were replaced."""
        gone = {f"{moment}.{name}" for name in names for moment in "mv"}
        return replace(self, tensors={name: tensor for name, tensor in self.tensors.items() if name not in gone})

    def step(self, before: Tensors, aggregate: Tensors) -> "tuple[Tensors, ServerOptimizer]":
        """The stack after the round, and the optimizer after the step.

        A tensor of ``before`` that is not in ``aggregate`` was not trained, and does not move. What follows has memory of its
        own, and is contiguous, or no file could hold it: a rule may give a client's tensors as that client laid them out.
        """
        aggregate = {name: new.clone(memory_format=contiguous_format) for name, new in aggregate.items()}
        if self.spec.optimizer == "none":
            return before | aggregate, self
        after, moments = dict(before), dict(self.tensors)
        for name, new in aggregate.items():
            moved, remembered = self._moved(name, new - before[name])
            after[name] = before[name] + moved
            moments |= remembered
        return after, replace(self, tensors=moments)

    def _moved(self, name: str, change: Tensor) -> tuple[Tensor, Tensors]:
        """What the pseudo-gradient ``change`` adds to the tensor called ``name``, and the moments to remember."""
        spec, rate = self.spec, self._rate
        momentum = self.tensors.get(f"m.{name}", zeros_like(change))
        if spec.optimizer == "momentum":
            momentum = spec.beta1 * momentum + change
            return rate * momentum, {f"m.{name}": momentum}
        second = self.tensors.get(f"v.{name}", full_like(change, spec.tau**2))
        square = change.square()
        momentum = spec.beta1 * momentum + (1 - spec.beta1) * change
        if spec.optimizer == "adam":
            second = spec.beta2 * second + (1 - spec.beta2) * square
        else:
            second = second - (1 - spec.beta2) * square * (second - square).sign()
        return rate * momentum / (second.sqrt() + spec.tau), {f"m.{name}": momentum, f"v.{name}": second}

    @property
    def _rate(self) -> float:
        default = _MOMENTUM_RATE if self.spec.optimizer == "momentum" else _ADAPTIVE_RATE
        return default if self.spec.server_learning_rate is None else self.spec.server_learning_rate
