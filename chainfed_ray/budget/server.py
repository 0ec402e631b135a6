"""Plans the memory of the server's evaluation: small layers are loaded whole, and the matrices of large ones are streamed."""

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.footprint import RUNTIME, WeightPlacement
from chainfed_ray.budget.planner import PREFIX_BATCH, embedding_bytes, running_bytes

SERVER_LAYERS = 256 * 2**20  # bytes; layers are streamed if more would have to be resident at once


def evaluation_weights(layer: int, conversion: int, window: int) -> tuple[WeightPlacement, WeightPlacement]:
    """How the server places the weights of the layers below a window of ``window`` layers, and of the window's own layers.

    ``layer`` and ``conversion`` are bytes, as in ``MemoryProfile``.
    """
    below, inside = 2 * layer + conversion, (window - 1) * layer + conversion
    return ("resident" if below <= SERVER_LAYERS else "streamed", "resident" if inside <= SERVER_LAYERS else "streamed")


def evaluation_bytes(memory: MemoryProfile, adapters: int, window: int, tokens: int) -> int:
    """The peak in bytes of evaluating the early exit at the top of ``window`` layers, with examples of ``tokens`` tokens.

    ``adapters`` is the number of adapters in the stack. The layers below the window's top run first, two resident at a time or
    streamed, each with a batch. Then the window's layers are resident all at once or streamed, with a batch, or with the head
    and its batch.
    """
    batch = PREFIX_BATCH
    window += memory.inside  # the bottom layer of such a window runs as well
    prefix, weights = evaluation_weights(memory.layer, memory.conversion, window)
    buffers = memory.slices if "streamed" in (prefix, weights) or memory.streamed_head else 0
    running = max(running_bytes(memory, batch, tokens), embedding_bytes(memory, batch, tokens))
    below = 2 * memory.layer + memory.conversion if prefix == "resident" else memory.unstreamed + memory.slices
    inside = (window - 1) * (memory.layer if weights == "resident" else memory.unstreamed) + buffers
    # The tensor being converted is alive while layers are loaded, before the first batch.
    working = max(running, memory.kept.head.forward_at(batch, tokens), memory.conversion)
    held = adapters * memory.adapter + memory.head + memory.skeleton + RUNTIME
    return held + memory.call.at(batch, tokens) + max(below + running, inside + working)
