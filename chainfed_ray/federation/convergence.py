"""When a stage has converged: two rules, under a minimum of rounds and the stage's limit."""

from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from chainfed_ray.model.adapters import Tensors
from chainfed_ray.spec.sections import ConvergenceSpec


class Movement:
    """Effective movement: |sum of updates| ÷ sum of |updates| over H rounds, both summed over the parameters.

    1 while every update goes the same way, towards 0 when they cancel out. H-round spans follow one another; a span's
    two sums are two copies of the window, kept as ``tensors`` so that a restart goes on where it was.
    """

    def __init__(self, tensors: Tensors | None = None) -> None:
        self.tensors: Tensors = tensors or {}

    def add(self, before: Tensors, after: Tensors) -> None:
        """Add the update of one round: the tensors of the window before and after it."""
        for name, new in after.items():
            change = new - before[name]
            self._add(f"net.{name}", change)
            self._add(f"path.{name}", change.abs())

    def _add(self, name: str, change: Tensor) -> None:
        self.tensors[name] = self.tensors[name] + change if name in self.tensors else change

    def value(self) -> float:
        """The effective movement of the span so far, in [0, 1]."""
        net = sum(
            tensor.abs().double().sum().item() for name, tensor in self.tensors.items() if name.startswith("net.")
        )
        path = sum(tensor.double().sum().item() for name, tensor in self.tensors.items() if name.startswith("path."))
        return net / path if path else 0.0


def verdict(rule: ConvergenceSpec, rounds: int, losses: Sequence[float], movement: float | None) -> str | None:
    """Why a stage of ``rounds`` counted rounds ends now, or None.

    ``losses`` are its held-out losses; ``movement`` is that of a span that is complete with this round, else None.
    """
    if rounds < rule.minimum:
        return None
    if rule.rule == "movement" and movement is not None and movement < rule.threshold:
        return f"converged: effective movement {movement:.3g} over {rule.span} rounds, below {rule.threshold:g}"
    if rule.rule == "plateau" and len(losses) >= 2 * rule.span:
        before = fmean(losses[-2 * rule.span : -rule.span])
        now = fmean(losses[-rule.span :])
        if before - now < rule.threshold * abs(before):
            return f"converged: held-out loss {before:.4f} → {now:.4f} over {rule.span} rounds"
    return None
