"""What an evaluation with the layers' weights on disk takes, by arithmetic: memory, locked memory and disk."""

from dataclasses import dataclass

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.planner import embedding_bytes, running_bytes, scoring_bytes
from chainfed_ray.model.blocks import Blocks

SWAPPED_BYTES = 2**20  # what is smaller stays in memory: DeepSpeed has it so

_PADDING = 1024  # numbers by which a buffer is longer: a disk is read in whole blocks
_RUNTIME = 20 * 2**20  # what DeepSpeed and the interpreter keep, as it was measured


@dataclass(frozen=True)
class OffloadFootprint:
    """Bytes of one of the processes at their highest, above itself when idle."""

    buffers: int  # locked, for what comes from the disk
    kept: int  # parameters too small for the disk
    loading: int  # a module's parameters as they are read, before they go to the disk
    gathered: int  # a module's parameters, with several processes: those of all, and a copy on the way
    activations: int
    stack: int
    runtime: int  # the model's skeleton, and what libraries and the interpreter keep

    @property
    def total(self) -> int:
        """The larger of loading and a forward pass, with what is there in both."""
        steady = self.buffers + self.kept + self.stack + self.runtime
        return steady + max(self.loading, self.gathered + self.activations)


def offload_footprint(blocks: Blocks, costs: MemoryProfile, workers: int, batch: int, tokens: int) -> OffloadFootprint:
    """What a process needs that judges ``batch`` examples of ``tokens`` tokens at a time, one of ``workers``."""
    size = blocks.dtype.itemsize
    layers = [list(layer.parameters()) for layer in blocks.blank_layers]
    small = sum(p.numel() for layer in layers for p in layer if -(-p.numel() // workers) * size < SWAPPED_BYTES)
    widest = _largest_module(blocks) * size
    running = running_bytes(costs, batch, tokens) + costs.call.at(batch, tokens)
    return OffloadFootprint(
        buffers=swap_bytes(blocks, workers),
        kept=-(-small // workers) * size,
        loading=widest + blocks.conversion_bytes,
        gathered=0 if workers == 1 else 2 * widest,
        activations=max(running, embedding_bytes(costs, batch, tokens), scoring_bytes(costs, batch, tokens)),
        stack=costs.layers * costs.adapter + costs.head,
        runtime=costs.skeleton + _RUNTIME,
    )


def swap_bytes(blocks: Blocks, workers: int) -> int:
    """The bytes of the buffers that a process locks in memory."""
    return buffers(blocks) * buffer_numbers(blocks, workers) * blocks.dtype.itemsize


def disk_bytes(blocks: Blocks) -> int:
    """The bytes of disk that the layers take, in all processes together."""
    return sum(p.numel() for layer in blocks.blank_layers for p in layer.parameters()) * blocks.dtype.itemsize


def buffers(blocks: Blocks) -> int:
    """How many parameters of one module go to the disk, at most: they are needed at once, and each in a buffer of its own."""
    size = blocks.dtype.itemsize
    large = (
        sum(p.numel() * size >= SWAPPED_BYTES for p in module.parameters(recurse=False))
        for layer in blocks.blank_layers
        for module in layer.modules()
    )
    return max(max(large), 1)


def buffer_numbers(blocks: Blocks, workers: int) -> int:
    """How many numbers one of the buffers holds."""
    largest = max(p.numel() for layer in blocks.blank_layers for p in layer.parameters())
    return -(-largest // workers) + _PADDING


def _largest_module(blocks: Blocks) -> int:
    """The numbers of the module with the most parameters of its own."""
    modules = (module for layer in blocks.blank_layers for module in layer.modules())
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in modules)
