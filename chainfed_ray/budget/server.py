"""What the server's evaluation needs, by arithmetic: whole layers where they are small, or else matrices that are streamed."""

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.planner import PREFIX_BATCH, RUNTIME, WeightPlacement, embedding_bytes, running_bytes

SERVER_LAYERS = 256 * 2**20  # bytes of whole layers at once, at most: larger ones are streamed


def evaluation_weights(layer: int, conversion: int, window: int) -> tuple[WeightPlacement, WeightPlacement]:
    """How the server runs the layers below a window of so many, and those of the window, when a layer has ``layer`` bytes."""
    below, inside = 2 * layer + conversion, (window - 1) * layer + conversion
    return ("resident" if below <= SERVER_LAYERS else "streamed", "resident" if inside <= SERVER_LAYERS else "streamed")


def evaluation_bytes(costs: MemoryProfile, adapters: int, window: int, tokens: int) -> int:
    """What the server holds at most as it judges the chain at the top of ``window`` layers, examples of ``tokens`` tokens.

    First the layers below the window's top, two at a time or their matrices by slices, with a batch on its way; then those of
    the window all at once, or by slices again, with a batch, or with the head and its batch.
    """
    batch = PREFIX_BATCH
    prefix, weights = evaluation_weights(costs.layer, costs.conversion, window)
    buffers = costs.slices if "streamed" in (prefix, weights) or costs.streamed_head else 0
    running = max(running_bytes(costs, batch, tokens), embedding_bytes(costs, batch, tokens))
    below = 2 * costs.layer + costs.conversion if prefix == "resident" else costs.unstreamed + costs.slices
    inside = (window - 1) * (costs.layer if weights == "resident" else costs.unstreamed) + buffers
    # A tensor that is converted is there while layers are loaded, before the first batch.
    working = max(running, costs.kept.head.forward_at(batch, tokens), costs.conversion)
    held = adapters * costs.adapter + costs.head + costs.skeleton + RUNTIME
    return held + costs.call.at(batch, tokens) + max(below + running, inside + working)
