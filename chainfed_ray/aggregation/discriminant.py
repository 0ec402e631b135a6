"""A classifier in closed form: linear discriminant analysis, from sums over examples that clients add up.

Ours, not the paper's. The sums of several clients are the sums over all their examples, so the classifier is the one that
a single machine with all the data would find, however unevenly the classes are dealt (compare Fed3R: Fanì et al., 2024).
All classes share one covariance Σ, and with the means μ_c and the frequencies π_c (Hastie et al., 2009, section 4.3)

    logit_c(f) = (μ_cᵀ Σ⁻¹ f − ½ μ_cᵀ Σ⁻¹ μ_c + log π_c) / temperature

Σ is drawn towards a multiple of the identity, and the temperature makes up for its being estimated on the very examples
(Guo et al., 2017). How far, and how much, is what gives the least loss on held-out examples.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from chainfed_ray.model.adapters import Tensors

_SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 0.6)
_LOWEST, _HIGHEST = 0.05, 100.0  # temperatures
_NARROWINGS = 40  # of that interval, each by a third: to within a millionth
_NO_EXAMPLE = 0.5  # a class that nobody has counts as half an example
_LEAST_VARIANCE = 1e-4  # of a feature, relative to its mean square
_SLACK = 1.01  # for rounding in float32


@dataclass(frozen=True)
class ClassSums:
    """Over features f [F] of examples of C classes: how many there are, Σ f by class, and Σ f fᵀ. Float32, or float64."""

    counts: Tensor  # [C]
    sums: Tensor  # [C, F]
    products: Tensor  # [F, F]

    @classmethod
    def zeros(cls, classes: int, features: int, dtype: torch.dtype = torch.float32) -> "ClassSums":
        """Of no examples."""
        return cls(
            torch.zeros(classes, dtype=dtype),
            torch.zeros(classes, features, dtype=dtype),
            torch.zeros(features, features, dtype=dtype),
        )

    def count(self, features: Tensor, labels: Tensor) -> None:
        """Add examples: features [B, F] and classes [B]."""
        self.counts.index_add_(0, labels, torch.ones(len(labels), dtype=self.counts.dtype))
        self.sums.index_add_(0, labels, features)
        self.products.addmm_(features.T, features)

    def add(self, other: "ClassSums") -> None:
        """Add the examples that another counted."""
        self.counts.add_(other.counts)
        self.sums.add_(other.sums)
        self.products.add_(other.products)

    def impossible(self, examples: int) -> str | None:
        """Why these are no sums over so many examples of features from LayerNorms, whose squares add up to F at most."""
        size = self.sums.shape[1]
        if (self.counts < 0).any() or self.counts.sum() != examples:
            return f"it counts {self.counts.sum():g} examples, not {examples}"
        if (self.sums.norm(dim=1) > _SLACK * size**0.5 * self.counts + _SLACK - 1).any():
            return "its features are larger than any that a LayerNorm gives"
        if not 0 <= self.products.trace() <= _SLACK * size * examples:
            return "its products are larger than any of features from a LayerNorm"
        return None

    def tensors(self) -> Tensors:
        """By name, as they are sent: of the products, which are symmetric, one half, [F (F + 1) / 2]."""
        size = len(self.products)
        half = self.products.new_empty(size * (size + 1) // 2)
        for row, (start, end) in enumerate(_rows_of_half(size)):
            half[start:end] = self.products[row, : row + 1]  # one by one: thousands of views take megabytes
        return {"counts": self.counts, "sums": self.sums, "products": half}

    @classmethod
    def of(cls, tensors: Tensors) -> "ClassSums":
        """Those that ``tensors()`` was called on."""
        counts, sums, half = (tensors[name] for name in ("counts", "sums", "products"))
        size = sums.shape[1]
        products = half.new_empty(size, size)
        for row, (start, end) in enumerate(_rows_of_half(size)):
            products[row, : row + 1] = products[: row + 1, row] = half[start:end]
        return cls(counts, sums, products)


def _rows_of_half(size: int) -> Iterator[tuple[int, int]]:
    """Where the rows of a triangle, each one longer than the one before, begin and end when they are put end to end."""
    return ((row * (row + 1) // 2, (row + 1) * (row + 2) // 2) for row in range(size))


def discriminant(sums: ClassSums, shrinkage: float) -> tuple[Tensor, Tensor]:
    """The weight [C, F] and the bias [C] at temperature 1, in float64; ``shrinkage`` in (0, 1] is the identity's share."""
    counts, total = sums.counts.double(), sums.counts.double().sum()
    means = sums.sums.double() / counts.clamp(min=1).unsqueeze(1)
    # In place: where a head reads several layers, this is the largest thing that the server has.
    covariance = sums.products.double().sub_((means * counts.unsqueeze(1)).T @ means).div_(total)
    # Where the features of a class hardly vary, what is left of Σ is rounding.
    least = _LEAST_VARIANCE * float(sums.products.diagonal().double().mean() / total)
    scale = covariance.diagonal().mean().clamp(min=max(least, torch.finfo(torch.float32).tiny))
    covariance.mul_(1 - shrinkage).diagonal().add_(shrinkage * scale)
    weight = torch.linalg.solve(covariance, means.T).T
    bias = counts.clamp(min=_NO_EXAMPLE).log() - total.log() - (weight * means).sum(1) / 2
    return weight, bias


def fitted(sums: ClassSums, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """The discriminant with the least loss on held-out features [n, F] of classes [n]: weight [C, F], bias [C], float32.

    None if there is none: sums that are not those of any examples can have no inverse.
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


def _calibration(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the least loss. In its inverse the loss is convex, so the interval may be cut by thirds."""
    low, high = 1 / _HIGHEST, 1 / _LOWEST
    for _ in range(_NARROWINGS):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if cross_entropy(logits * left, labels) < cross_entropy(logits * right, labels):
            high = right
        else:
            low = left
    return 2 / (low + high)
