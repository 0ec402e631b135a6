"""GPO: the loss that a window is trained to minimise, loss = local + λ · global (paper section 3.3)."""

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
    """The cross-entropy that a head gives for a layer's ``states``, in nats, summed over the examples: a scalar.

    With ``head_learns`` the head receives a gradient from it.
    """

    def __call__(self, states: LayerStates, head_learns: bool) -> Tensor: ...


class Objective(Protocol):
    """The loss, summed over the batch, of a window whose output is ``states``: what training minimises.

    With an exact look-ahead ``window`` has the layers above the trained ones as well, up to the model's top.

    ``stack`` has all adapters and the head, ``mask`` [B, T] is 1 for tokens and 0 for padding, ``loss`` is the job's
    cross-entropy. You may give a function of your own (docs/python.md). It runs in the client's process, and must not hold
    more than the client's plan, which is made for ``chain_loss``.
    """

    def __call__(
        self, stack: AdapterStack, window: Window, states: LayerStates, mask: Tensor, loss: LossFunction
    ) -> Tensor: ...


def classification_loss(head: Head, mask: Tensor, labels: Tensor) -> LossFunction:
    """The cross-entropy of ``labels`` [B], given by a classifier over the tokens of ``mask`` [B, T]."""

    def loss(states: LayerStates, head_learns: bool) -> Tensor:
        inputs = states.hidden, mask, states.pooled
        logits = head(*inputs) if head_learns else _held_still(head, *inputs)
        return cross_entropy(logits, labels, reduction="sum")

    return loss


def language_modeling_loss(
    blocks: Blocks, ids: np.ndarray, mask: Tensor, targets: Tensor, source: RowSlices
) -> LossFunction:
    """The cross-entropy of the ``targets`` [B, T], given by the base model's own head, which never learns."""
    return lambda states, head_learns: next_token_loss(blocks, states.hidden, ids, mask, targets.numpy(), source)


def trained_names(
    names: Iterable[str], window: Window, global_weight: float, global_trains: GlobalTrains
) -> frozenset[str]:
    """The tensors of a stack, among those called ``names``, that a client trains in this window and sends back."""
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
    loss: LossFunction,
    *,
    global_weight: float,
    head_follows_global: bool,
) -> Tensor:
    """local + λ · global, with λ = ``global_weight`` (GPO, paper section 3.3), summed over the batch: a scalar.

    The local loss is that of the window's output ``states``, with their ``mask`` [B, T]. The global branch takes the same
    states through the adapters above the window, each an emulator of its layer, and then through the head. A window at the
    top has nothing above it: its local loss is the end-to-end loss.
    """
    local = loss(states, True)
    upper = [layer for layer in stack.layers if layer > window.top]
    if not upper or global_weight == 0:
        return local
    return local + global_weight * loss(emulate(stack, upper, states, mask), head_follows_global)


def emulate(stack: AdapterStack, layers: Sequence[int], states: LayerStates, mask: Tensor) -> LayerStates:
    """The states after the adapters of ``layers``, each an emulator of its layer: the layers themselves do not run.

    Features are pooled at each adapter, as they would be at its layer.
    """
    hidden, pooled = states
    for layer in layers:
        pooled = stack.pool(pooled, hidden, mask)
        hidden = stack.adapter(layer)(hidden)
    return LayerStates(hidden, pooled)


def _held_still(head: Head, *inputs: Tensor) -> Tensor:
    """The head's logits, without a gradient for the head."""
    still = {name: parameter.detach() for name, parameter in head.named_parameters()}
    logits: Tensor = functional_call(head, still, inputs)
    return logits
