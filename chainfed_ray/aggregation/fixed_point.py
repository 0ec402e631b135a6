"""Sums of integers in place of floating-point numbers: the same bits in any order, so updates are added as they arrive.

Floating-point addition is not associative. Integer addition is, as long as nothing overflows. So each number is rounded to a
whole multiple of 2^-f, weighted and added as an int64. The sums of parts of a round add up to the sums of the round.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Of an entry in a round, by any rule: far more than training needs, and little enough for fine sums.
MOST_CHANGE = 256.0
_MOST_BITS = 62  # a sum is at most 2^62, half of what an int64 holds
_FINEST = 1000  # 2^-1000 is a float64, and finer than any number that matters


@dataclass(frozen=True)
class FixedPoint:
    """The form of numbers x with |x| ≤ ``bound``, for sums in which their weights add up to ``weight`` at most.

    x becomes the integer q nearest to x · 2^f, where f is ``fraction_bits``. With 2^b ≥ ``bound`` and 2^w ≥ ``weight``, the
    least such powers, f is 62 − b − w. No sum overflows: |q| ≤ 2^(b + f), so |Σ weight · q| ≤ 2^w · 2^(b + f) = 2^62 < 2^63.

    A mean of numbers in this form is at most 2^-(f + 1) from the exact one, and 2^-f if they are rounded towards zero.

    Raises:
        ValueError: ``bound`` is not positive and finite, or ``weight`` is not from 1 to 2^53.
    """

    bound: float
    weight: int

    def __post_init__(self) -> None:
        if not 0 < self.bound < math.inf or not 1 <= self.weight <= 2**53:
            raise ValueError(f"numbers of at most {self.bound} with weights of at most {self.weight}")

    @cached_property
    def fraction_bits(self) -> int:
        """f: numbers are whole multiples of 2^-f."""
        mantissa, exponent = math.frexp(self.bound)
        return min(_MOST_BITS - (exponent - (mantissa == 0.5)) - (self.weight - 1).bit_length(), _FINEST)

    def whole(self, values: Tensor, towards_zero: bool = False, summed: int = 1) -> Tensor:
        """The integers for ``values`` (float64, which are overwritten), in int64. What is beyond the bound is held at it.

        They are the nearest ones or, ``towards_zero``, the nearest that are not larger in size. If the values are sums of so
        many numbers each, ``summed``, their bound is as many times as large.
        """
        most = self.bound * summed
        values.clamp_(-most, most).mul_(2.0**self.fraction_bits)  # a power of two, so this rounds nothing
        return (values.trunc_() if towards_zero else values.round_()).to(torch.int64)


class FixedPointSums:
    """Weighted sums of named tensors in a ``form``. Each name has a sum of its own, and weights of its own."""

    def __init__(self, form: FixedPoint) -> None:
        self.form = form
        self.weights: Counter[str] = Counter()
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, weight: int, towards_zero: bool = False) -> None:
        """Add ``weight`` times the ``values`` (float64, which are overwritten) to the sum called ``name``.

        Raises:
            OverflowError: the weights of the name add up to more than the form allows.
        """
        self._add(name, self.form.whole(values, towards_zero).mul_(weight), weight)

    def add_sum(self, name: str, values: Tensor, summed: int) -> None:
        """Add ``values`` (float64, which are overwritten) that are sums already, of so many numbers each, ``summed``.

        Raises:
            OverflowError: the numbers of the name are more than the form allows.
        """
        self._add(name, self.form.whole(values, summed=summed), summed)

    def merge(self, other: "FixedPointSums") -> None:
        """Add the sums of ``other`` updates, which are in the same form. ``other`` stays as it was.

        Raises:
            ValueError: they are in another form.
            OverflowError: the weights of a name add up to more than the form allows.
        """
        if other.form != self.form:
            raise ValueError(f"sums in the form {other.form} cannot be added to sums in the form {self.form}")
        for name, whole in other._sums.items():
            self._add(name, whole.clone(), other.weights[name])

    def total(self, name: str) -> Tensor:
        """The weighted sum called ``name``, in float64."""
        return self._sums[name].double().mul_(2.0**-self.form.fraction_bits)

    def _add(self, name: str, whole: Tensor, weight: int) -> None:
        if self.weights[name] + weight > self.form.weight:
            raise OverflowError(f"the weights of {name} are more than {self.form.weight}, for which its sum has room")
        self.weights[name] += weight
        self._sums[name] = self._sums[name].add_(whole) if name in self._sums else whole


def beyond(start: Mapping[str, Tensor], trained: Mapping[str, Tensor], bound: float) -> str | None:
    """The reason why changes from ``start`` to ``trained`` are not taken, or None: an entry's is beyond ``bound``."""
    for name, tensor in trained.items():
        moved = float((tensor - start[name]).abs_().max())
        if moved > bound:
            return f"{name} changed by {moved:.3g}, and changes of at most {bound:g} are taken"
    return None
