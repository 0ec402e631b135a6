"""The forward pass of a base model with adapters: each layer, its adapter, and the pooled features of the layers below.

Clients and the server run adapted models through this file, whether layers are resident, streamed, or fetched from disk by
DeepSpeed. The exceptions run in a model's own forward, by hooks: the generator, and our PEFT method.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from chainfed_ray.chain import Window
from chainfed_ray.data.tokens import Batch
from chainfed_ray.model.adapters import Adapted
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.pooling import LayerStates, no_features
from chainfed_ray.model.trunk import LayerCall


def embed(blocks: Blocks, batch: Batch) -> tuple[LayerStates, list[LayerCall]]:
    """Tokens [B, T] → the states [B, T, D] that enter layer 0, and the call of each layer."""
    hidden, calls = blocks.embed(batch.ids, batch.mask)
    return LayerStates(hidden, no_features(hidden)), calls


def through_layer(
    blocks: Blocks,
    stack: Adapted,
    index: int,
    layer: nn.Module,
    call: LayerCall,
    states: LayerStates,
    mask: Tensor,
) -> LayerStates:
    """Run layer ``index`` without its adapter.

    ``states`` are the embeddings or the output of the adapter below; their pooled features are appended before the layer runs.
    """
    hidden, pooled = states
    del states  # frees its pooled features
    if index:
        pooled = stack.pool(pooled, hidden, mask)
    return LayerStates(blocks.run(layer, hidden, call), pooled)


def through_adapter(stack: Adapted, index: int, states: LayerStates) -> LayerStates:
    """Run the adapter of layer ``index``. Without an adapter the states are unchanged."""
    if index not in stack.layers:
        return states
    return states._replace(hidden=stack.adapter(index)(states.hidden))


def through_model(blocks: Blocks, stack: Adapted, layers: Iterable[tuple[int, nn.Module]], batch: Batch) -> LayerStates:
    """Run all ``layers`` in order, each with its adapter: tokens [B, T] → the states after the last layer."""
    states, calls = embed(blocks, batch)
    for index, layer in layers:
        states = _through(blocks, stack, index, layer, calls[index], states, batch.mask)
    return states


def through_window(
    blocks: Blocks, stack: Adapted, window: Window, layers: dict[int, nn.Module], states: LayerStates, mask: Tensor
) -> LayerStates:
    """Run a window: its bottom layer's output u → its top adapter's output h. ``layers`` are the layers above
    the bottom one.
    """
    states = through_adapter(stack, window.bottom, states)
    calls = blocks.calls(mask) if layers else []
    # A loop here, and not a function that is given ``states``: this frame would hold them while the layers run.
    for index, layer in layers.items():
        states = _through(blocks, stack, index, layer, calls[index], states, mask)
    return states


def _through(
    blocks: Blocks,
    stack: Adapted,
    index: int,
    layer: nn.Module,
    call: LayerCall,
    states: LayerStates,
    mask: Tensor,
) -> LayerStates:
    """Run a layer and its adapter."""
    return through_adapter(stack, index, through_layer(blocks, stack, index, layer, call, states, mask))
