"""The forward pass: a base layer, its adapter, and the pooled features of the layers below, carried along.

Whoever runs a model with adapters on it runs it through here: clients and the server, by layers that are whole in memory, that
are streamed, or that DeepSpeed fetches from a disk.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from chainfed_ray.chain import Window
from chainfed_ray.data.tokens import Batch
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks, LayerCall
from chainfed_ray.model.pooling import LayerStates, no_features


def embed(blocks: Blocks, batch: Batch) -> tuple[LayerStates, list[LayerCall]]:
    """Tokens [B, T] → the states [B, T, D] that enter layer 0, and the call of each layer."""
    hidden, calls = blocks.embed(batch.ids, batch.mask)
    return LayerStates(hidden, no_features(hidden)), calls


def through_layer(
    blocks: Blocks,
    stack: AdapterStack,
    index: int,
    layer: nn.Module,
    call: LayerCall,
    states: LayerStates,
    mask: Tensor,
) -> LayerStates:
    """Layer ``index``, without its adapter: from what came out below it, through the adapter there, or from the embeddings."""
    hidden, pooled = states
    del states  # its pooled features may go
    if index:
        pooled = stack.pool(pooled, hidden, mask)
    return LayerStates(blocks.run(layer, hidden, call), pooled)


def through_adapter(stack: AdapterStack, index: int, states: LayerStates) -> LayerStates:
    """The adapter of layer ``index``, where there is one."""
    if index not in stack.layers:
        return states
    return states._replace(hidden=stack.adapter(index)(states.hidden))


def through_layers(
    blocks: Blocks,
    stack: AdapterStack,
    layers: Iterable[tuple[int, nn.Module]],
    calls: Sequence[LayerCall],
    states: LayerStates,
    mask: Tensor,
) -> LayerStates:
    """Layers one after the other, each with its adapter."""
    for index, layer in layers:
        states = through_layer(blocks, stack, index, layer, calls[index], states, mask)
        states = through_adapter(stack, index, states)
    return states


def through_window(
    blocks: Blocks, stack: AdapterStack, window: Window, layers: dict[int, nn.Module], states: LayerStates, mask: Tensor
) -> LayerStates:
    """A window: from its bottom layer's output u to its top adapter's output h; ``layers`` are those above the bottom one."""
    states = through_adapter(stack, window.bottom, states)
    if not layers:
        return states
    return through_layers(blocks, stack, layers.items(), blocks.calls(mask), states, mask)
