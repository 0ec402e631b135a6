"""Offloads saved activations: what autograd saves for the backward pass is kept in a file instead of in memory.

A tensor is written when it is saved and read when the backward pass needs it, so that only the operands of one operation are in
memory at a time. It costs a fifth of a step's time, and is for clients that cannot fit even one example at a time.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PIECES = 16  # an activation's gradient is computed in this many pieces, to save memory


class _Place(NamedTuple):
    """A tensor's place in the file, with its shape and dtype."""

    start: int
    shape: torch.Size
    dtype: torch.dtype


class OffloadedActivations(torch.autograd.graph.saved_tensors_hooks):
    """``with OffloadedActivations(folder): loss = …`` and then ``loss.backward()``: a file holds what the backward pass needs.

    The file has no name, so nothing of it remains, whatever happens to the process. Parameters and masks stay in memory.

    Raises:
        OSError: the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed with this object
        self._end = 0
        super().__init__(self._put, self._get)  # type: ignore[no-untyped-call]

    def __enter__(self) -> None:
        self._end = 0  # the previous step's activations have been used
        super().__enter__()

    def close(self) -> None:
        """Close the file, which frees its disk space."""
        self._file.close()

    def _put(self, tensor: Tensor) -> Any:
        if not is_offloaded(tensor):
            return tensor
        place = _Place(self._end, tensor.shape, tensor.dtype)
        _whole(os.pwrite, self._file.fileno(), tensor.contiguous(), place.start)
        self._end += tensor.nbytes
        return place

    def _get(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        tensor = torch.empty(kept.shape, dtype=kept.dtype)
        _whole(lambda file, view, start: os.preadv(file, [view], start), self._file.fileno(), tensor, kept.start)
        return tensor


class OverwritingActivation(nn.Module):
    """An elementwise function, such as GELU, whose backward pass writes the gradient over its saved input.

    Only for steps that offload activations: there the input was read from the file for this purpose alone, and nothing else
    uses it. A feed-forward layer's widest tensor is then in memory twice instead of three times.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, inputs: Tensor) -> Tensor:
        """The function of each element, in the shape of ``inputs``."""
        outputs: Tensor = _Overwriting.apply(inputs, self._function)  # type: ignore[no-untyped-call]
        return outputs


class _Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(inputs)
        return function(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (inputs,) = ctx.saved_tensors
        pieces = zip(inputs.view(-1).chunk(_PIECES), gradients[0].reshape(-1).chunk(_PIECES), strict=True)
        for values, gradient in pieces:
            some = values.clone().requires_grad_()
            with torch.enable_grad():
                outputs = ctx.function(some)
            values.copy_(torch.autograd.grad(outputs, some, gradient)[0])
        return inputs, None


def overwrite_activations(layer: nn.Module) -> None:
    """Replace each of a layer's elementwise activation functions with an ``OverwritingActivation``."""
    from transformers.activations import ACT2CLS  # it imports all that a model does: see lean_imports.py

    elementwise = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
    for path, module in list(layer.named_modules()):
        if type(module) in elementwise and not list(module.parameters()):
            layer.set_submodule(path, OverwritingActivation(module))


def is_offloaded(tensor: Tensor) -> bool:
    """True if a saved tensor is an activation with bytes of its own: not a parameter, a mask or a broadcast tensor."""
    origin = tensor if tensor._base is None else tensor._base
    return (
        tensor.is_floating_point()
        and tensor.dim() > 1
        and 0 not in tensor.stride()
        and not isinstance(origin, nn.Parameter)
    )


def _whole(move: Any, file: int, tensor: Tensor, start: int) -> None:
    view = memoryview(tensor.detach().view(-1).view(torch.uint8).numpy().data)
    done = 0
    while done < len(view):
        count = move(file, view[done:], start + done)
        if count == 0:
            raise OSError("the file of offloaded activations ended early")
        done += count
