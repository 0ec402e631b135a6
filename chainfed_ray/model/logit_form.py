"""How a family of language models turns products with its head's matrix into logits: a bias, a scale, a soft cap."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# The name of a family's scale in its configuration, and 1 if the family multiplies by it or -1 if it divides. Other families
# use the same names for something else, or ignore them.
_SCALES = {
    "cohere": ("logit_scale", 1),
    "granite": ("logits_scaling", -1),
    "hyperclovax": ("logits_scaling", 1),
    "minicpm3": ("logits_scaling", -1),
}
_UNKNOWN = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "unpadded_vocab_size",
)
_HEADS = ("lm_head.", "embed_out.", "cls.")
_BIAS = "lm_head.bias"
_PARTS = ("lm_head.weight", "embed_out.weight", _BIAS)


@dataclass(frozen=True)
class LogitForm:
    """logits = cap · tanh(scale · z / cap), or scale · z without a cap, where z = hidden · matrixᵀ + bias.

    ``bias`` is the checkpoint's name for the bias [V], or None.
    """

    scale: float = 1.0
    cap: float | None = None
    bias: str | None = None

    def apply(self, products: Tensor) -> Tensor:
        """z of any shape → logits. It overwrites z."""
        if self.scale != 1:
            products.mul_(self.scale)
        return products if self.cap is None else products.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor:
        """d logit / dz at each of ``logits``, in their shape; a scalar if it is the same for all."""
        if self.cap is None:
            return logits.new_tensor(self.scale)
        return (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)  # tanh' = 1 - tanh²


def form_of(config: Any, names: Set[str]) -> LogitForm:
    """The logit form of a model with this ``config``, whose checkpoint has tensors called ``names``.

    Raises:
        ValueError: the head has an operation that is not known here; the message is the name of its key or tensor.
    """
    word, power = next((_SCALES[family] for family in _SCALES if config.model_type.startswith(family)), ("", 1))
    unknown = [key for key in _UNKNOWN if key != word and getattr(config, key, None) not in (None, 1)]
    unknown += sorted(name for name in names if name.startswith(_HEADS) and name not in _PARTS)
    if unknown:
        raise ValueError(unknown[0])
    scale, cap = getattr(config, word, None), getattr(config, "final_logit_softcapping", None)
    return LogitForm(
        scale=1.0 if scale is None else float(scale) ** power,
        cap=None if cap is None else float(cap),
        bias=_BIAS if _BIAS in names else None,
    )
