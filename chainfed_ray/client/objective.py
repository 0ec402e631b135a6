"""GPO: what a window is trained for. loss = local + λ · global (paper section 3.3)."""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from chainfed_ray.chain import Window
from chainfed_ray.model.adapters import AdapterStack, Head
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.lm_head import next_token_loss
from chainfed_ray.model.pooling import LayerStates
from chainfed_ray.streaming.matrices import RowSlices

GlobalTrains = Literal["window", "head", "upper"]


class LossFunction(Protocol):
    """The loss of a layer's states in nats, summed over the examples: a scalar; the head learns from it or not."""

    def __call__(self, states: LayerStates, head_learns: bool) -> Tensor: ...


def classification_loss(head: Head, mask: Tensor, labels: Tensor) -> LossFunction:
    """The cross-entropy of ``labels`` [B], given by a classifier over the tokens of ``mask`` [B, T]."""

    def judge(states: LayerStates, head_learns: bool) -> Tensor:
        inputs = states.hidden, mask, states.pooled
        logits = head(*inputs) if head_learns else _held_still(head, *inputs)
        return cross_entropy(logits, labels, reduction="sum")

    return judge


def language_modeling_loss(
    blocks: Blocks, ids: np.ndarray, mask: Tensor, targets: Tensor, source: RowSlices
) -> LossFunction:
    """The cross-entropy of the ``targets`` [B, T], given by the base model's own head, which never learns."""
    return lambda states, head_learns: next_token_loss(blocks, states.hidden, ids, mask, targets.numpy(), source)


def trained_names(
    names: Iterable[str], window: Window, global_weight: float, global_trains: GlobalTrains
) -> frozenset[str]:
    """Of a stack's tensors, called ``names``, those that a client trains in this window, and sends back."""
    above = global_weight > 0 and global_trains == "upper"

    def is_trained(name: str) -> bool:
        kind, _, rest = name.partition(".")
        if kind == "head":
            return True
        layer = int(rest.partition(".")[0])
        return window.bottom <= layer <= window.top or (above and layer > window.top)

    return frozenset(name for name in names if is_trained(name))


def chain_loss(
    stack: AdapterStack,
    window: Window,
    states: LayerStates,
    mask: Tensor,
    judge: LossFunction,
    *,
    global_weight: float,
    head_follows_global: bool,
) -> Tensor:
    """The loss of a window whose output is ``states``, with their ``mask`` [B, T], summed over the batch: a scalar.

    The global branch carries the same states through the adapters above the window, each the stand-in of its layer, and
    then the head. With the window at the top there is nothing above: the local loss is the end-to-end loss.
    """
    local = judge(states, True)
    upper = [layer for layer in stack.layers if layer > window.top]
    if not upper or global_weight == 0:
        return local
    return local + global_weight * judge(emulate(stack, upper, states, mask), head_follows_global)


def emulate(stack: AdapterStack, layers: Sequence[int], states: LayerStates, mask: Tensor) -> LayerStates:
    """The states that come out of the adapters of ``layers`` alone; what they give is read as if it were their layers'."""
    hidden, pooled = states
    for layer in layers:
        pooled = stack.pool(pooled, hidden, mask)
        hidden = stack.adapter(layer)(hidden)
    return LayerStates(hidden, pooled)


def _held_still(head: Head, *inputs: Tensor) -> Tensor:
    """The head's logits with no gradient for the head itself."""
    still = {name: parameter.detach() for name, parameter in head.named_parameters()}
    logits: Tensor = functional_call(head, still, inputs)
    return logits
