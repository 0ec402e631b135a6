"""Plans what an evaluation with the layers' weights on disk needs: memory, locked memory and disk. Arithmetic only."""

from dataclasses import dataclass

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.planner import embedding_bytes, running_bytes, scoring_bytes
from chainfed_ray.model.blocks import Blocks

SWAPPED_BYTES = 2**20  # DeepSpeed keeps smaller parameters in memory

_LOOKING_AHEAD = ("t5", "mt5", "umt5")
_PADDING = 1024  # elements added to each buffer, because a disk is read in whole blocks
_RUNTIME = 20 * 2**20  # measured: what DeepSpeed and the interpreter hold


@dataclass(frozen=True)
class OffloadFootprint:
    """The peak memory of one process of the evaluation, in bytes above the idle process, part by part."""

    buffers: int  # locked memory, into which parameters are read from disk
    kept: int  # parameters too small for the disk, which stay in memory
    loading: int  # a module's parameters when the model is loaded, before they are written to disk
    gathered: int  # with several processes: a module's whole parameters from all of them, and a copy in transit
    activations: int
    stack: int  # adapters and head
    runtime: int  # the model without weights, and what libraries and the interpreter hold

    @property
    def total(self) -> int:
        """The peak: what loading and a forward pass share, and the larger of what each needs alone."""
        steady = self.buffers + self.kept + self.stack + self.runtime
        return steady + max(self.loading, self.gathered + self.activations)


def offload_footprint(
    blocks: Blocks, profile: MemoryProfile, workers: int, batch: int, tokens: int
) -> OffloadFootprint:
    """The peak memory of one of ``workers`` processes that evaluate ``batch`` examples of ``tokens`` tokens at a time."""
    size = blocks.dtype.itemsize
    layers = [list(layer.parameters()) for layer in blocks.blank_layers]
    small = sum(p.numel() for layer in layers for p in layer if -(-p.numel() // workers) * size < SWAPPED_BYTES)
    widest = _largest_module(blocks) * size
    running = running_bytes(profile, batch, tokens) + profile.call.at(batch, tokens)
    return OffloadFootprint(
        buffers=swap_bytes(blocks, workers),
        kept=-(-small // workers) * size,
        loading=widest + blocks.conversion_bytes,
        gathered=0 if workers == 1 else 2 * widest,
        activations=max(running, embedding_bytes(profile, batch, tokens), scoring_bytes(profile, batch, tokens)),
        stack=profile.layers * profile.adapter + profile.head,
        runtime=profile.skeleton + _RUNTIME,
    )


def swap_bytes(blocks: Blocks, workers: int) -> int:
    """The bytes that a process locks in memory for its buffers."""
    return buffer_count(blocks) * buffer_elements(blocks, workers) * blocks.dtype.itemsize


def disk_bytes(blocks: Blocks) -> int:
    """The bytes of disk that the layers take, for all processes together."""
    return sum(p.numel() for layer in blocks.blank_layers for p in layer.parameters()) * blocks.dtype.itemsize


def buffer_count(blocks: Blocks) -> int:
    """The number of buffers: the most parameters on disk that one module has. It needs all at once, each in a buffer.

    T5 looks at the dtype of a feed-forward layer's second matrix before it uses the first, and DeepSpeed reads it then.
    """
    size = blocks.dtype.itemsize
    large = (
        sum(p.numel() * size >= SWAPPED_BYTES for p in module.parameters(recurse=False))
        for layer in blocks.blank_layers
        for module in layer.modules()
    )
    return max(max(large), 1) + (blocks.family in _LOOKING_AHEAD)


def buffer_elements(blocks: Blocks, workers: int) -> int:
    """The number of elements of one buffer: a process's part of the largest parameter, with padding."""
    largest = max(p.numel() for layer in blocks.blank_layers for p in layer.parameters())
    return -(-largest // workers) + _PADDING


def _largest_module(blocks: Blocks) -> int:
    """The number of elements of the largest module, counting only the parameters of the module itself."""
    modules = (module for layer in blocks.blank_layers for module in layer.modules())
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in modules)
