"""Promise: a language model's loss with a streamed head is the loss on its whole logits, in value and in gradient."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from chainfed_ray.device.peak import PeakMemory
from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.lm_head import next_token_scores, streamed_cross_entropy
from chainfed_ray.model.logit_form import LogitForm
from tests.models import tiny

VOCABULARY, WIDTH = 23, 6
FORMS = {
    "plain": LogitForm(),
    "bias": LogitForm(bias="bias"),
    "scale": LogitForm(scale=0.3),
    "cap": LogitForm(cap=2.5),
    "all": LogitForm(scale=0.3, cap=1.5, bias="bias"),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@dataclass(frozen=True)
class Rows:
    """A matrix in memory, ``step`` rows at a time, and the bias that goes with it."""

    matrix: Tensor
    step: int

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        assert name == "head"
        for first in range(0, len(self.matrix), self.step):
            yield first, self.matrix[first : first + self.step]

    def numbers(self, name: str, first: int, count: int) -> Tensor:
        assert name == "bias"
        return a_bias(self.matrix)[first : first + count]


def some(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def a_bias(matrix: Tensor) -> Tensor:
    return torch.linspace(-2, 1, len(matrix), dtype=torch.float64).to(matrix.dtype)


def logits_of(hidden: Tensor, matrix: Tensor, form: LogitForm) -> Tensor:
    """Written down again from the formula."""
    logits = (hidden @ matrix.T + (a_bias(matrix) if form.bias else 0)) * form.scale
    return form.cap * torch.tanh(logits / form.cap) if form.cap else logits


def stock(hidden: Tensor, targets: Tensor, weights: Tensor, matrix: Tensor, form: LogitForm) -> Tensor:
    return (cross_entropy(logits_of(hidden, matrix, form), targets, reduction="none") * weights).sum()


def both(
    hidden: Tensor, targets: Tensor, weights: Tensor, matrix: Tensor, step: int, form: LogitForm
) -> list[tuple[Tensor, Tensor]]:
    """The loss and its gradient; ours and torch's."""
    ours = streamed_cross_entropy(hidden.requires_grad_(), targets.numpy(), weights, Rows(matrix, step), "head", form)
    theirs = stock(hidden, targets, weights, matrix, form)
    return [(loss, *torch.autograd.grad(loss * 0.3, hidden)) for loss in (ours, theirs)]


@pytest.mark.slow
@given(
    count=st.integers(1, 8),
    step=st.integers(1, VOCABULARY + 1),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 99),
    form=st.sampled_from(list(FORMS.values())),
)
@settings(deadline=None)
def test_slices_of_the_vocabulary_give_the_whole_loss(
    count: int, step: int, scale: float, seed: int, form: LogitForm
) -> None:
    """Also for logits whose exponential overflows, and for tokens that count for nothing."""
    targets = torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
    weights = some(count, seed=seed).clamp(min=0)
    hidden, matrix = some(count, WIDTH, seed=seed) * scale, some(VOCABULARY, WIDTH, seed=1)
    ours, theirs = both(hidden, targets, weights, matrix, step, form)
    assert torch.isfinite(ours[0])
    torch.testing.assert_close(ours, theirs)
    assert not ours[1][weights == 0].any()


@pytest.mark.parametrize("direction", [1, -1])
@every_form
def test_logits_that_grow_or_fall_from_slice_to_slice(direction: int, form: LogitForm) -> None:
    """The highest logit so far is replaced in each slice, or never; the first ones vanish beside the last."""
    matrix = torch.linspace(-1000, 1000, VOCABULARY, dtype=torch.float64)[:, None].expand(-1, WIDTH) * direction
    targets, weights = torch.tensor([0, 11, 22]), torch.ones(3)
    ours, theirs = both(torch.ones(3, WIDTH, dtype=torch.float64), targets, weights, matrix, 4, form)
    torch.testing.assert_close(ours, theirs)


@every_form
def test_the_gradient_is_that_of_the_function(form: LogitForm) -> None:
    targets, weights = torch.tensor([0, 22, 7, 7]), torch.tensor([0.5, 2, 0, 1], dtype=torch.float64)
    rows = Rows(some(VOCABULARY, WIDTH, seed=1), 5)
    assert torch.autograd.gradcheck(
        lambda hidden: streamed_cross_entropy(hidden, targets.numpy(), weights, rows, "head", form),
        (some(4, WIDTH, seed=2).requires_grad_(),),
    )


@pytest.mark.slow
@every_form
def test_half_precision_sums_in_float32(form: LogitForm) -> None:
    """The loss of bfloat16 operands is that of the same operands in float32, but for the rounding of the logits."""
    hidden, matrix = some(64, 32, seed=1, dtype=torch.float32), some(5000, 32, seed=2, dtype=torch.float32) / 4
    targets, weights = torch.arange(64), torch.full((64,), 1 / 64)
    ours, _ = both(hidden.bfloat16(), targets, weights, matrix.bfloat16(), 7, form)
    _, exact = both(hidden.bfloat16().float(), targets, weights, matrix.bfloat16().float(), 7, form)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(ours[1].float(), exact[1], rtol=0.02, atol=1e-5)


@dataclass(frozen=True)
class Bare:
    """In the place of ``Blocks``: a model that does nothing after its last layer."""

    logit_form: LogitForm
    language_head: str = "head"

    def finish(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden


@pytest.mark.slow
@given(data=st.data(), step=st.integers(1, VOCABULARY + 1), form=st.sampled_from(list(FORMS.values())))
@settings(deadline=None)
def test_scores_are_those_of_the_whole_logits(data: st.DataObject, step: int, form: LogitForm) -> None:
    """With ties, within a slice and across slices: the first of the likeliest is the model's choice, as argmax has it."""
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    few = st.integers(-1, 1)  # of numbers and of places: so that logits tie
    hidden = torch.tensor(data.draw(st.lists(few, min_size=batch * tokens * 2, max_size=batch * tokens * 2)))
    matrix = torch.tensor(data.draw(st.lists(few, min_size=VOCABULARY * 2, max_size=VOCABULARY * 2)))
    hidden, matrix = hidden.double().view(batch, tokens, 2), matrix.double().view(VOCABULARY, 2)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=batch * tokens, max_size=batch * tokens))).view(
        batch, tokens
    )
    targets = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens))).view(
        batch, tokens
    )
    targets[:, 0] = False
    blocks: Any = Bare(form)
    losses, right = next_token_scores(
        blocks, hidden, ids.numpy(), torch.ones_like(ids), targets.numpy(), Rows(matrix, step)
    )
    logits = logits_of(hidden, matrix, form)
    for row in range(batch):
        places = targets[row].nonzero().squeeze(1)
        before, wanted = logits[row, places - 1], ids[row, places]
        torch.testing.assert_close(losses[row], cross_entropy(before, wanted, reduction="sum"))
        assert right[row] == (before.argmax(1) == wanted).sum()


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "xlnet"])
def test_a_model_without_a_language_head_is_refused(family: str, tmp_path: Path) -> None:
    blocks = Blocks(tiny(family, tmp_path), torch.float32)
    with pytest.raises(UnsupportedModel, match="no head of a language model"):
        assert blocks.language_head


class _NoFamily:
    """As much of ``Blocks`` as scores ask for: a head that does nothing first, and is called ``head``."""

    language_head, logit_form = "head", LogitForm()

    def finish(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden


def test_scores_hold_the_logits_of_one_slice_and_once() -> None:
    rows, step = 1024, 8192
    hidden = some(2, rows // 2, 16, seed=0, dtype=torch.float32)
    source = Rows(some(3 * step, 16, seed=1, dtype=torch.float32), step)
    ids = np.zeros((2, rows // 2), dtype=np.int64)
    targets = np.ones_like(ids, dtype=np.bool_)
    mask = torch.ones(2, rows // 2)
    with PeakMemory() as peak:
        next_token_scores(cast("Blocks", _NoFamily()), hidden, ids, mask, targets, source)
    assert peak.bytes is None or peak.bytes < 1.5 * rows * step * 4
