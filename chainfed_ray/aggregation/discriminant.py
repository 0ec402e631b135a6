"""Fits a classifier in closed form, by linear discriminant analysis of sums over the clients' examples.

This is ours, not the paper's. The sums of several clients add up to the sums over all their examples. So the classifier is the
same as on a single machine with all the data, however unevenly the classes are partitioned (compare Fed3R: Fanì et al., 2024).
All classes share one covariance Σ. With class means μ_c and class frequencies π_c (Hastie et al., 2009, section 4.3)::

    logit_c(f) = (μ_cᵀ Σ⁻¹ f − ½ μ_cᵀ Σ⁻¹ μ_c + log π_c) / temperature

Σ is shrunk towards a multiple of the identity. The logits are too confident, because Σ is estimated on the training examples.
The temperature corrects this (Guo et al., 2017). Both are chosen for the least loss on held-out examples.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from chainfed_ray.client.head_sums import TEMPERATURES, ClassSums

_SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 0.6)
_LOWEST, _HIGHEST = TEMPERATURES[0], TEMPERATURES[-1]
_NARROWINGS = 40  # steps of the search, each cutting the range by a third: the result is exact to a millionth
_NO_EXAMPLE = 0.5  # a class without examples counts as half an example, so that its log-frequency is finite
_LEAST_VARIANCE = 1e-4  # the least variance of a feature, relative to its mean square


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
