"""From blocks of quantized weights to their values, bit by bit those of the ``gguf`` package's own code, and of bitsandbytes.

The forms that most files have are written here: they take a half to a quarter of the time of ``gguf``'s code, and of that of
transformers, which does the others. A few blocks at a time are turned into values, so the memory that this takes does not grow
with a tensor.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.integrations.gguf.dequant import GGML_NAME, dequantize  # their own; the version is pinned

from chainfed_ray.block_forms import FORMS

AT_ONCE = 2**17  # values; a multiple of every form's block. Fewer cost more time, more cost memory.
# Measured: the most bytes that are held for each of the values computed at once, their blocks among them.
_HELD_BY_OURS, _HELD_BY_THEIRS = 8, 24
_KINDS = {name: kind for kind, name in GGML_NAME.items()}
# The 16 levels of NF4: quantiles of a normal distribution, scaled to −1 … 1 (QLoRA, arXiv 2305.14314, appendix E).
_LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
_PAIRS = torch.cartesian_prod(_LEVELS, _LEVELS)  # [256, 2]: the two levels of each byte, that of its upper half first


def to_values(form: str, blocks: Tensor, values: Tensor) -> None:
    """Fill ``values`` [n], of any floating-point dtype, from the ``blocks`` that hold them, as bytes.

    The values are computed in float32, and rounded to another dtype after that.
    """
    each = FORMS[form]
    parts = blocks.view(-1, each.bytes).split(AT_ONCE // each.values)
    is_exact = values.dtype == torch.float32
    room = torch.empty(0 if is_exact else min(len(values), AT_ONCE), dtype=torch.float32)
    for part, wanted in zip(parts, values.split(AT_ONCE), strict=True):
        exact = wanted if is_exact else room[: len(wanted)]
        if form in _OURS:
            _OURS[form](part, exact.view(len(part), each.values))
        else:
            exact.copy_(dequantize(part, _KINDS[form]))
        if not is_exact:
            wanted.copy_(exact)


def dequantizing_bytes(form: str) -> int:
    """The most bytes that ``to_values`` holds besides the values."""
    return AT_ONCE * (_HELD_BY_OURS if form in _OURS else _HELD_BY_THEIRS)


def _halves(blocks: Tensor, count: int) -> Tensor:
    """The first ``count`` numbers of each block, which are float16, as float32."""
    return blocks[:, : 2 * count].view(torch.float16).float()


def _nibbles(packed: Tensor, integers: Tensor) -> None:
    """Bytes [n, k] → ``integers`` [n, 2, k]: the lower four bits of each, and the upper four."""
    integers[:, 0] = packed & 15
    integers[:, 1] = packed >> 4


def _q4_0(blocks: Tensor, values: Tensor) -> None:
    _nibbles(blocks[:, 2:], values.view(-1, 2, 16))
    values.sub_(8).mul_(_halves(blocks, 1))


def _q4_1(blocks: Tensor, values: Tensor) -> None:
    scale, least = _halves(blocks, 2).split(1, dim=1)
    _nibbles(blocks[:, 4:], values.view(-1, 2, 16))
    values.mul_(scale).add_(least)


def _with_fifth_bits(bits: Tensor, packed: Tensor, values: Tensor) -> None:
    """Four bits of each value as in ``_nibbles``, and its fifth from ``bits`` [n, 4]."""
    integers = (bits.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).bitwise_left_shift_(4)
    halves = integers.view(-1, 2, 16)
    halves[:, 0] |= packed & 15
    halves[:, 1] |= packed >> 4
    values.copy_(integers.view(values.shape))


def _q5_0(blocks: Tensor, values: Tensor) -> None:
    _with_fifth_bits(blocks[:, 2:6], blocks[:, 6:], values)
    values.sub_(16).mul_(_halves(blocks, 1))


def _q5_1(blocks: Tensor, values: Tensor) -> None:
    scale, least = _halves(blocks, 2).split(1, dim=1)
    _with_fifth_bits(blocks[:, 4:8], blocks[:, 8:], values)
    values.mul_(scale).add_(least)


def _q8_0(blocks: Tensor, values: Tensor) -> None:
    values.copy_(blocks[:, 2:].view(torch.int8)).mul_(_halves(blocks, 1))


def _q4_k(blocks: Tensor, values: Tensor) -> None:
    """Eight groups of 32 values, each with a scale and a least value of six bits."""
    scale, least = _halves(blocks, 2).split(1, dim=1)
    low, middle, high = blocks[:, 4:16].split(4, dim=1)
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], dim=1)
    leasts = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], dim=1)
    _nibbles(blocks[:, 16:].reshape(-1, 32), values.view(-1, 2, 32))
    groups = values.view(-1, 8, 32)
    groups.mul_((scale * scales).unsqueeze(2)).sub_((least * leasts).unsqueeze(2))


def _nf4(blocks: Tensor, values: Tensor) -> None:
    torch.index_select(_PAIRS, 0, blocks[:, 4:].int().view(-1), out=values.view(-1, 2))
    values.mul_(blocks[:, :4].view(torch.float32))


_OURS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "NF4": _nf4,
}
