"""Promise: a language model's loss with a streamed head is the loss on its whole logits, in value and in gradient."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from chainfed_ray.blocks import Blocks
from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.lm_head import next_token_loss, streamed_cross_entropy
from chainfed_ray.stream import SliceReader
from chainfed_ray.weights import Checkpoint
from tests.models import tiny, tiny_causal_model

VOCABULARY, WIDTH = 23, 6
LENGTHS = (9, 2, 7, 1)


@dataclass(frozen=True)
class Rows:
    """A matrix in memory, ``step`` rows at a time."""

    matrix: Tensor
    step: int

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        assert name == "head"
        for first in range(0, len(self.matrix), self.step):
            yield first, self.matrix[first : first + self.step]


def some(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stock(hidden: Tensor, targets: Tensor, weights: Tensor, matrix: Tensor) -> Tensor:
    return (cross_entropy(hidden @ matrix.T, targets, reduction="none") * weights).sum()


def both(hidden: Tensor, targets: Tensor, weights: Tensor, matrix: Tensor, step: int) -> list[tuple[Tensor, Tensor]]:
    """The loss and its gradient; ours and torch's."""
    ours = streamed_cross_entropy(hidden.requires_grad_(), targets.numpy(), weights, Rows(matrix, step), "head")
    theirs = stock(hidden, targets, weights, matrix)
    return [(loss, *torch.autograd.grad(loss * 0.3, hidden)) for loss in (ours, theirs)]


@given(
    count=st.integers(1, 8),
    step=st.integers(1, VOCABULARY + 1),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_slices_of_the_vocabulary_give_the_whole_loss(count: int, step: int, scale: float, seed: int) -> None:
    """Also for logits whose exponential overflows, and for tokens that count for nothing."""
    targets = torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
    weights = some(count, seed=seed).clamp(min=0)
    ours, theirs = both(some(count, WIDTH, seed=seed) * scale, targets, weights, some(VOCABULARY, WIDTH, seed=1), step)
    assert torch.isfinite(ours[0])
    torch.testing.assert_close(ours, theirs)
    assert not ours[1][weights == 0].any()


@pytest.mark.parametrize("direction", [1, -1])
def test_logits_that_grow_or_fall_from_slice_to_slice(direction: int) -> None:
    """The highest logit so far is replaced in each slice, or never; the first ones vanish beside the last."""
    matrix = torch.linspace(-1000, 1000, VOCABULARY, dtype=torch.float64)[:, None].expand(-1, WIDTH) * direction
    targets, weights = torch.tensor([0, 11, 22]), torch.ones(3)
    ours, theirs = both(torch.ones(3, WIDTH, dtype=torch.float64), targets, weights, matrix, 4)
    torch.testing.assert_close(ours, theirs)


def test_the_gradient_is_that_of_the_function() -> None:
    targets, weights = torch.tensor([0, 22, 7, 7]), torch.tensor([0.5, 2, 0, 1], dtype=torch.float64)
    rows = Rows(some(VOCABULARY, WIDTH, seed=1), 5)
    assert torch.autograd.gradcheck(
        lambda hidden: streamed_cross_entropy(hidden, targets.numpy(), weights, rows, "head"),
        (some(4, WIDTH, seed=2).requires_grad_(),),
    )


def test_half_precision_sums_in_float32() -> None:
    """The loss of bfloat16 operands is that of the same operands in float32, but for the rounding of the logits."""
    hidden, matrix = some(64, 32, seed=1, dtype=torch.float32), some(5000, 32, seed=2, dtype=torch.float32) / 4
    targets, weights = torch.arange(64), torch.full((64,), 1 / 64)
    ours, _ = both(hidden.bfloat16(), targets, weights, matrix.bfloat16(), 7)
    _, exact = both(hidden.bfloat16().float(), targets, weights, matrix.bfloat16().float(), 7)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(ours[1].float(), exact[1], rtol=0.02, atol=1e-5)


def a_batch() -> tuple[Tensor, Tensor]:
    """Examples of unequal length, padded on the right; the last has no next token."""
    ids = torch.randint(3, 128, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(LENGTHS))[None, :] < torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_loss_is_that_of_the_hugging_face_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_causal_model(family, tied).requires_grad_(False)
    model.save_pretrained(tmp_path)
    blocks, ids, mask = Blocks(tmp_path, torch.float32), *a_batch()
    assert ("lm_head.weight" in Checkpoint(tmp_path).names) != tied

    # Ours: the whole padded batch, the head in slices of 8 rows.
    hidden, calls = blocks.embed(ids, mask)
    for index, call in enumerate(calls):
        hidden = blocks.run(blocks.load_layer(index), hidden, call)
    reader = SliceReader(Checkpoint(tmp_path), torch.float32, slice_bytes=1024)
    loss = next_token_loss(blocks, hidden.requires_grad_(), ids.numpy(), mask, mask.bool(), reader)
    (gradient,) = torch.autograd.grad(loss, hidden)
    reader.close()

    # Theirs: each example by itself, without padding.
    last_layer = model.base_model.get_submodule(blocks.layers_path)[-1]
    expected = torch.zeros(())
    for row, length in enumerate(LENGTHS):
        outputs: list[Tensor] = []

        def keep(_: object, __: object, output: Tensor | tuple[Tensor], kept: list[Tensor] = outputs) -> None:
            kept.append((output[0] if isinstance(output, tuple) else output).requires_grad_())

        hook = last_layer.register_forward_hook(keep)
        alone = ids[row : row + 1, :length]
        theirs = model(input_ids=alone, labels=alone).loss
        hook.remove()
        if length > 1:
            expected = expected + theirs.detach()
            (wanted,) = torch.autograd.grad(theirs, outputs[0])
            torch.testing.assert_close(gradient[row, :length], wanted[0])
        assert not gradient[row, max(length - 1, 0) :].any(), "nothing follows the last token"
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_without_a_language_head_is_refused(family: str, tmp_path: Path) -> None:
    blocks = Blocks(tiny(family, tmp_path), torch.float32)
    with pytest.raises(UnsupportedModel, match="no head of a language model"):
        assert blocks.language_head


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_a_head_that_does_more_than_multiply_is_refused(family: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            family, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, vocab_size=64, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(UnsupportedModel, match=r"logit.* not supported yet"):
        assert Blocks(tmp_path, torch.float32).language_head
