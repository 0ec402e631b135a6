"""The forward pass of a base model with adapters: each layer, its adapter, and the pooled features of the layers below.

Clients and the server run adapted models through this file, whether layers are resident, streamed, or fetched from disk by
DeepSpeed. The exceptions run in a model's own forward, by hooks: the generator, our PEFT method, and models that are handed
over to other engines.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chainfed_ray.chain import Window
from chainfed_ray.data.tokens import Batch
from chainfed_ray.model.adapters import Adapted
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.pooling import LayerStates, append_pooled, no_features
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
    """Run layer ``index``, with what the stack adds inside it, and without what follows it.

    ``states`` are the embeddings or the output of the adapter below; their pooled features are appended before the layer runs.
    """
    hidden, pooled = states
    del states  # frees its pooled features
    if index:
        pooled = stack.pool(pooled, hidden, mask)
    with added(layer, stack.inside(index)):
        return LayerStates(blocks.run(layer, hidden, call), pooled)


def through_adapter(stack: Adapted, index: int, states: LayerStates) -> LayerStates:
    """Run what follows layer ``index``. If nothing does, the states are unchanged."""
    adapter = stack.after(index)
    return states if adapter is None else states._replace(hidden=adapter(states.hidden))


@contextmanager
def added(layer: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within the block, add to the output of each module at a path in ``layer`` what ``changes`` makes of its input."""

    def add(
        change: Callable[[Tensor], Tensor], _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        return output + change(inputs[0])

    hooks = [layer.get_submodule(path).register_forward_hook(partial(add, change)) for path, change in changes.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def through_model(blocks: Blocks, stack: Adapted, layers: Iterable[tuple[int, nn.Module]], batch: Batch) -> LayerStates:
    """Run all ``layers`` in order, each with its adapter: tokens [B, T] → the states after the last layer."""
    states, calls = embed(blocks, batch)
    for index, layer in layers:
        states = _through(blocks, stack, index, layer, calls[index], states, batch.mask)
    return states


def through_window(
    blocks: Blocks,
    stack: Adapted,
    window: Window,
    layers: dict[int, nn.Module],
    states: LayerStates,
    mask: Tensor,
    recompute: bool = False,
) -> LayerStates:
    """Run a window: its bottom layer's output u → its top adapter's output h. ``layers`` are those above the bottom one.

    With ``recompute`` a layer's input alone is kept for the backward pass, where the layer runs again. So the activations of
    one layer at a time are in memory (gradient checkpointing: Chen et al., 2016).
    """
    states = through_adapter(stack, window.bottom, states)
    calls = blocks.calls(mask) if layers else []
    # A loop here, and not a function that is given ``states``: this frame would hold them while the layers run.
    for index, layer in layers.items():
        run = partial(_through, blocks, stack, index, layer, calls[index], mask=mask)
        states = _recomputed(run, states) if recompute else run(states=states)
    return states


def through_whole(
    reader: nn.Module, layers: nn.ModuleList, adapters: Mapping[int, nn.Module], ids: Tensor, mask: Tensor
) -> LayerStates:
    """Run a Hugging Face model by its own forward: ids and mask [B, T] → the states after its last layer.

    ``reader`` is the part of the model that reads texts, ``layers`` are its layers, and ``adapters`` follow theirs. The pooled
    features are those of all layers below the last one.
    """
    passed: list[LayerStates] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        pooled = no_features(hidden)
        if passed:
            below = passed.pop()
            pooled = append_pooled(below.pooled, below.hidden, mask, len(layers))
        passed.append(LayerStates(hidden, pooled))

    # The hooks take the output of the last layer. Some families apply a norm after it, which the chain's head was not
    # trained with.
    hooks = [layers[index].register_forward_hook(partial(adapt, adapter)) for index, adapter in adapters.items()]
    hooks += [layer.register_forward_hook(keep) for layer in layers]
    try:
        reader(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    (states,) = passed
    return states


def adapt(adapter: Callable[[Tensor], Tensor], _layer: nn.Module, _inputs: Any, output: Any) -> Any:
    """A hook for a layer, once ``adapter`` is given: the output [B, T, D] of the layer, with its adapter."""
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


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


def _recomputed(run: Callable[..., LayerStates], states: LayerStates) -> LayerStates:
    """Run a layer, and again in the backward pass. No layer draws random numbers: none is in training mode."""

    def again(hidden: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return run(states=LayerStates(hidden, pooled))

    return LayerStates(*checkpoint(again, *states, use_reentrant=False, preserve_rng_state=False))
