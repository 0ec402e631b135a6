"""Fits a classifier in closed form, by linear discriminant analysis of sums over the clients' examples.

This is ours, not the paper's. The sums of several clients add up to the sums over all their examples. So the classifier is the
same as on a single machine with all the data, however unevenly the classes are partitioned (compare Fed3R: Fanì et al., 2024).
All classes share one covariance Σ. With class means μ_c and class frequencies π_c (Hastie et al., 2009, section 4.3)::

    logit_c(f) = (μ_cᵀ Σ⁻¹ f − ½ μ_cᵀ Σ⁻¹ μ_c + log π_c) / temperature

Σ is shrunk towards a multiple of the identity. The logits are too confident, because Σ is estimated on the training examples.
The temperature corrects this (Guo et al., 2017). Both are chosen for the least loss on held-out examples.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from chainfed_ray.model.adapters import Tensors

_SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 0.6)
_LOWEST, _HIGHEST = 0.05, 100.0  # the range of temperatures
TEMPERATURES = tuple(float(heat) for heat in np.geomspace(_LOWEST, _HIGHEST, 60))  # neighbours differ by an eighth
_NARROWINGS = 40  # steps of the search, each cutting the range by a third: the result is exact to a millionth
_NO_EXAMPLE = 0.5  # a class without examples counts as half an example, so that its log-frequency is finite
_LEAST_VARIANCE = 1e-4  # the least variance of a feature, relative to its mean square
_SLACK = 1.01  # allows for rounding in float32


@dataclass(frozen=True)
class ClassSums:
    """Sums over the features f [F] of examples of C classes, in float32 or float64."""

    counts: Tensor  # [C]: examples of each class
    sums: Tensor  # [C, F]: Σ f for each class
    products: Tensor  # [F, F]: Σ f fᵀ over all examples

    @classmethod
    def zeros(cls, classes: int, features: int, dtype: torch.dtype = torch.float32) -> "ClassSums":
        """The sums over no examples."""
        return cls(
            torch.zeros(classes, dtype=dtype),
            torch.zeros(classes, features, dtype=dtype),
            torch.zeros(features, features, dtype=dtype),
        )

    def count(self, features: Tensor, labels: Tensor) -> None:
        """Add B examples, with features [B, F] and labels [B]."""
        self.counts.index_add_(0, labels, torch.ones(len(labels), dtype=self.counts.dtype))
        self.sums.index_add_(0, labels, features)
        self.products.addmm_(features.T, features)

    def add(self, other: "ClassSums") -> None:
        """Add the sums over other examples."""
        self.counts.add_(other.counts)
        self.sums.add_(other.sums)
        self.products.add_(other.products)

    def impossible(self, examples: int) -> str | None:
        """The reason why these cannot be the sums over ``examples`` examples, or None if they can.

        Features come from LayerNorms, so the squares of an example's F features add up to F at most.
        """
        size = self.sums.shape[1]
        if (self.counts < 0).any() or (self.counts != self.counts.round()).any() or self.counts.sum() != examples:
            return f"it counts {self.counts.sum():g} examples, not {examples}"
        if (self.sums.norm(dim=1) > _SLACK * size**0.5 * self.counts + _SLACK - 1).any():
            return "its features are larger than any that a LayerNorm gives"
        if not 0 <= self.products.trace() <= _SLACK * size * examples:
            return "its products are larger than any of features from a LayerNorm"
        # Of any features, |Σ f_i f_j| is at most the root of Σ f_i² · Σ f_j².
        roots = self.products.diagonal().clamp(min=0).sqrt()
        if (self.products.abs() > _SLACK * torch.outer(roots, roots) + _SLACK - 1).any():
            return "its products are not those of any features"
        return None

    def tensors(self) -> Tensors:
        """The sums by name, as they are sent: of the symmetric products only the lower half, [F (F + 1) / 2]."""
        size = len(self.products)
        half = self.products.new_empty(size * (size + 1) // 2)
        for row, (start, end) in enumerate(_rows_of_half(size)):
            half[start:end] = self.products[row, : row + 1]  # row by row: all views at once would take megabytes
        return {"counts": self.counts, "sums": self.sums, "products": half}

    @classmethod
    def of(cls, tensors: Tensors) -> "ClassSums":
        """The sums whose ``tensors()`` were sent."""
        counts, sums, half = (tensors[name] for name in ("counts", "sums", "products"))
        size = sums.shape[1]
        products = half.new_empty(size, size)
        for row, (start, end) in enumerate(_rows_of_half(size)):
            products[row, : row + 1] = products[: row + 1, row] = half[start:end]
        return cls(counts, sums, products)


def largest(features: int) -> float:
    """A bound of what an example adds to any entry of ``ClassSums`` that are possible, with F = ``features``."""
    return 2.0 * features


def _rows_of_half(size: int) -> Iterator[tuple[int, int]]:
    """The start and the end of each row of a lower triangle, in the flat tensor of its rows end to end."""
    return ((row * (row + 1) // 2, (row + 1) * (row + 2) // 2) for row in range(size))


def discriminant(sums: ClassSums, shrinkage: float) -> tuple[Tensor, Tensor]:
    """The classifier at temperature 1: weight [C, F] and bias [C] in float64.

    ``shrinkage`` in (0, 1] is the share of the identity in Σ.

    Raises:
        RuntimeError: Σ is singular.
    """
    counts, total = sums.counts.double(), sums.counts.double().sum()
    means = sums.sums.double() / counts.clamp(min=1).unsqueeze(1)
    # In place: with several head layers, the covariance is the server's largest tensor.
    covariance = sums.products.double().sub_((means * counts.unsqueeze(1)).T @ means).div_(total)
    # If the features hardly vary within their classes, Σ is only rounding errors, and their scale is no variance.
    least = _LEAST_VARIANCE * float(sums.products.diagonal().double().mean() / total)
    scale = covariance.diagonal().mean().clamp(min=max(least, torch.finfo(torch.float32).tiny))
    covariance.mul_(1 - shrinkage).diagonal().add_(shrinkage * scale)
    weight = torch.linalg.solve(covariance, means.T).T
    bias = counts.clamp(min=_NO_EXAMPLE).log() - total.log() - (weight * means).sum(1) / 2
    return weight, bias


def fitted(sums: ClassSums, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """The discriminant with the least loss on held-out ``features`` [n, F] with ``labels`` [n].

    Returns the weight [C, F] and the bias [C] in float32. It returns None if no shrinkage gives a finite loss, which happens
    when the sums are not those of any examples.
    """
    best = None
    for shrinkage in _SHRINKAGES:
        try:
            weight, bias = discriminant(sums, shrinkage)
        except RuntimeError:  # it is singular
            continue
        logits = features.double() @ weight.T + bias
        temperature = _calibration(logits, labels)
        loss = float(cross_entropy(logits / temperature, labels))
        if math.isfinite(loss) and (best is None or loss < best[0]):
            best = loss, (weight / temperature).float(), (bias / temperature).float()
    return None if best is None else (best[1], best[2])


def candidates(sums: ClassSums) -> list[tuple[Tensor, Tensor]]:
    """The classifiers that ``fitted`` chooses among, each at temperature 1: weights [C, F] and biases [C] in float32.

    For held-out examples that are elsewhere: ``grid_losses`` is computed there, and ``TEMPERATURES`` are tried.
    """
    found = []
    for shrinkage in _SHRINKAGES:
        try:
            weight, bias = discriminant(sums, shrinkage)
        except RuntimeError:  # it is singular
            continue
        if weight.isfinite().all() and bias.isfinite().all():
            found.append((weight.float(), bias.float()))
    return found


def grid_losses(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> tuple[tuple[float, ...], int]:
    """The loss of a classifier at each of ``TEMPERATURES``, in nats, and how many examples it gets right.

    Both are sums over ``features`` [n, F] with ``labels`` [n], so those of several sets add up.
    """
    logits = features.double() @ weight.double().T + bias.double()
    losses = tuple(float(cross_entropy(logits / heat, labels, reduction="sum")) for heat in TEMPERATURES)
    return losses, int((logits.argmax(1) == labels).sum())


def _calibration(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the least loss. The loss is convex in 1 / temperature, so a ternary search finds it."""
    low, high = 1 / _HIGHEST, 1 / _LOWEST
    for _ in range(_NARROWINGS):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if cross_entropy(logits * left, labels) < cross_entropy(logits * right, labels):
            high = right
        else:
            low = left
    return 2 / (low + high)
