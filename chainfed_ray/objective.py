"""GPO: what a window is trained for. loss = local + λ · global (paper section 3.3)."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from chainfed_ray.adapter import AdapterStack
from chainfed_ray.chain import Window

GlobalTrains = Literal["window", "head", "upper"]


def trained_names(
    stack: AdapterStack, window: Window, global_weight: float, global_trains: GlobalTrains
) -> frozenset[str]:
    """The names of the tensors that a client trains in this window, and sends back."""
    layers: set[int] = set(window)
    if global_weight > 0 and global_trains == "upper":
        layers |= {layer for layer in stack.layers if layer > window.top}
    prefixes = ("head.", *(f"adapters.{layer}." for layer in layers))
    return frozenset(name for name in stack.state_dict() if name.startswith(prefixes))


def chain_loss(
    stack: AdapterStack,
    window: Window,
    hidden: Tensor,
    mask: Tensor,
    labels: Tensor,
    *,
    global_weight: float,
    head_follows_global: bool,
) -> Tensor:
    """The loss of a window whose output is ``hidden`` [B, T, D], summed over the batch: a scalar.

    The global branch carries the same hidden states through the adapters above the window, each the stand-in of its
    layer, and then the head. With the window at the top there is nothing above: the local loss is the end-to-end loss.
    """
    local = cross_entropy(stack.head(hidden, mask), labels, reduction="sum")
    upper = [layer for layer in stack.layers if layer > window.top]
    if not upper or global_weight == 0:
        return local
    ahead = carry(stack, upper, hidden)
    logits = stack.head(ahead, mask) if head_follows_global else _head_held_still(stack, ahead, mask)
    return local + global_weight * cross_entropy(logits, labels, reduction="sum")


def carry(stack: AdapterStack, layers: Sequence[int], hidden: Tensor) -> Tensor:
    """[B, T, D] → [B, T, D] through the adapters of ``layers`` alone."""
    for layer in layers:
        hidden = stack.adapter(layer)(hidden)
    return hidden


def _head_held_still(stack: AdapterStack, hidden: Tensor, mask: Tensor) -> Tensor:
    """The head's logits with no gradient for the head itself."""
    still = {name: parameter.detach() for name, parameter in stack.head.named_parameters()}
    logits: Tensor = functional_call(stack.head, still, (hidden, mask))
    return logits
