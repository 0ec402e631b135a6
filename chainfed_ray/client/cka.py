"""FOAT: how far each layer has moved from the embeddings, by linear CKA (paper section 3.4; Kornblith et al., 2019).

The estimator of the Hilbert-Schmidt independence criterion is the unbiased one of Song et al. (2012): the plain one
tends to 1 as the examples get fewer, and would let small clients move the start of the chain.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FEWEST = 4  # examples, for the unbiased estimator


def debiased_cka(first: Tensor, second: Tensor) -> float:
    """Linear CKA of two representations [n, D1] and [n, D2] of the same n examples, at most 1.

    Raises:
        ValueError: there are fewer than ``FEWEST`` examples.
    """
    if len(first) < FEWEST:
        raise ValueError(f"CKA needs {FEWEST} examples or more, not {len(first)}")
    gram_first, gram_second = _gram(first), _gram(second)
    scale = (_hsic(gram_first, gram_first) * _hsic(gram_second, gram_second)).clamp(min=0).sqrt()
    # A representation that does not vary is similar to nothing.
    return float(_hsic(gram_first, gram_second) / scale) if scale > 0 else 0.0


def _gram(representation: Tensor) -> Tensor:
    centred = representation.double() - representation.double().mean(0)
    return (centred @ centred.T).fill_diagonal_(0)


def _hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - the letters of the paper
    """Song et al. (2012), equation 5, for Gram matrices [n, n] with a zero diagonal; without its constant factor."""
    n = len(k)
    return (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ l.sum(0)) / (n - 2)


def average(profiles: Sequence[tuple[Sequence[float], int]]) -> tuple[float, ...]:
    """The mean of clients' profiles (a similarity for each layer), weighted by their examples."""
    values = torch.tensor([list(profile) for profile, _ in profiles], dtype=torch.float64)
    weights = torch.tensor([examples for _, examples in profiles], dtype=torch.float64)
    return tuple(((values * weights[:, None]).sum(0) / weights.sum()).tolist())
