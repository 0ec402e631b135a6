"""Promises of CKA: it is what the paper writes, and it does not rise as examples get fewer."""

import pytest
import torch
from torch import Tensor

from chainfed_ray.client.profiling import FEWEST_FOR_CKA, debiased_cka


def plain_hsic(first: Tensor, second: Tensor) -> float:
    """Song et al. (2012), equation 5, as it is written there: of the kernels of representations, without their diagonals."""
    n = len(first)
    k, l = ((each.double() @ each.double().T) * (1 - torch.eye(n, dtype=torch.double)) for each in (first, second))  # noqa: E741
    ones = torch.ones(n, dtype=torch.double)
    inner = torch.trace(k @ l)
    outer = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return float((inner + outer - 2 / (n - 2) * (ones @ k @ l @ ones)) / (n * (n - 3)))


@pytest.mark.parametrize("examples", [4, 5, 9, 40])
def test_cka_is_what_the_paper_writes(examples: int) -> None:
    generator = torch.Generator().manual_seed(examples)
    first = torch.randn(examples, 6, generator=generator) + 3  # far from the origin, which must not matter
    second = first[:, :3].tanh() + 0.1 * torch.randn(examples, 3, generator=generator)
    both, own, other = (plain_hsic(*pair) for pair in ((first, second), (first, first), (second, second)))
    assert debiased_cka(first, second) == pytest.approx(both / (own * other) ** 0.5, rel=1e-9)


def test_fewer_examples_than_the_estimator_needs_are_refused() -> None:
    few = torch.randn(FEWEST_FOR_CKA - 1, 8)
    with pytest.raises(ValueError, match="CKA needs 4 examples or more, not 3"):
        debiased_cka(few, few)


def test_cka_does_not_rise_as_examples_get_fewer() -> None:
    """Of representations that have nothing to do with one another it is 0 on average, however few the examples."""
    generator = torch.Generator().manual_seed(0)
    for examples in (4, 8, 64):
        pairs = torch.randn(200, 2, examples, 32, generator=generator)
        values = [debiased_cka(first, second) for first, second in pairs]
        assert abs(sum(values) / len(values)) < 0.05
        assert debiased_cka(pairs[0, 0], 3 * pairs[0, 0]) == pytest.approx(1)


def test_cka_of_what_does_not_vary_is_nothing() -> None:
    assert debiased_cka(torch.ones(8, 4), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))) == 0
