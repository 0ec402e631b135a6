"""Linear CKA: the similarity of a layer's output to the embeddings (FOAT, paper section 3.4; Kornblith et al., 2019).

The Hilbert-Schmidt independence criterion is estimated without bias (Song et al., 2012). The usual, biased estimator tends to 1
as the examples get fewer, so clients with few examples would move the start of the chain.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FEWEST = 4  # the fewest examples for which the unbiased estimator is defined


def debiased_cka(first: Tensor, second: Tensor) -> float:
    """Linear CKA of two representations [n, D1] and [n, D2] of the same n examples, at most 1.

    Raises:
        ValueError: there are fewer than ``FEWEST`` examples.
    """
    if len(first) < FEWEST:
        raise ValueError(f"CKA needs {FEWEST} examples or more, not {len(first)}")
    gram_first, gram_second = _gram(first), _gram(second)
    scale = (_hsic(gram_first, gram_first) * _hsic(gram_second, gram_second)).clamp(min=0).sqrt()
    # If a representation is constant, CKA is not defined; it then counts as dissimilar.
    return float(_hsic(gram_first, gram_second) / scale) if scale > 0 else 0.0


def _gram(representation: Tensor) -> Tensor:
    centred = representation.double() - representation.double().mean(0)
    return (centred @ centred.T).fill_diagonal_(0)


def _hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741  the paper's letters
    """The unbiased estimator (Song et al., 2012, equation 5) without its constant factor, which cancels in CKA.

    ``k`` and ``l`` are Gram matrices [n, n] with a zero diagonal.
    """
    n = len(k)
    return (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ l.sum(0)) / (n - 2)


def average(profiles: Sequence[tuple[Sequence[float], int]]) -> tuple[float, ...]:
    """The mean CKA of each layer over clients. ``profiles`` has each client's CKA by layer, and its examples as the weight."""
    values = torch.tensor([list(profile) for profile, _ in profiles], dtype=torch.float64)
    weights = torch.tensor([examples for _, examples in profiles], dtype=torch.float64)
    return tuple(((values * weights[:, None]).sum(0) / weights.sum()).tolist())
