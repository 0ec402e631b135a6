"""Keeps libraries that a turn never uses out of a process that this package starts: half of what would be loaded otherwise."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_MASKS = "torch._dynamo._trace_wrapped_higher_order_op"  # transformers' masks take one class from it
_HIDDEN = ("is_accelerate_available", "is_scipy_available", "is_torch_distributed_available")


@contextmanager
def lean_transformers() -> Iterator[None]:
    """Import transformers' models without what they import but do not need, for the length of the block.

    Every model of transformers imports Accelerate, SciPy and torch's distributed tensors if they are installed, and torch's
    compiler: 110 MiB of memory and 2.5 seconds of CPU time. Within the block transformers believes that the first three are not
    installed, and decorators that only tell the compiler what to leave alone leave functions as they are. The modules that it
    imports within the block keep to that. So this is for processes that this package starts, and not for a user's own.

    Import a model's code for the first time inside this block. Once the compiler is loaded, there is nothing left to spare.
    """
    if _COMPILER in sys.modules:
        yield
        return
    import transformers.utils  # noqa: F401  # has the functions; here, so that to import this file costs nothing

    # The functions are looked up in transformers.utils, and in modules that were imported before and have them from there.
    loaded = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("transformers.")]
    originals = [(names, name, names[name]) for names in loaded for name in _HIDDEN if name in names]
    placeholders = {_COMPILER: _Compiler(_COMPILER), _MASKS: _Masks(_MASKS)}
    for names, name, _ in originals:
        names[name] = lambda *_: False
    sys.modules.update(placeholders)
    try:
        yield
    finally:
        for names, name, original in originals:
            names[name] = original
        for name, placeholder in placeholders.items():
            if sys.modules.get(name) is placeholder:
                del sys.modules[name]


def load_models() -> None:
    """Load what the models of transformers have in common, without what they do not need, for the life of this process."""
    with lean_transformers():
        importlib.import_module("transformers.modeling_layers")
        importlib.import_module("transformers.masking_utils")


class _Compiler(ModuleType):
    """Stands for ``torch._dynamo`` while models are imported. What it does not have itself, it takes from the real module."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # or the import system would not take it for a package

    @staticmethod
    def disable(function: Any = None, *_: Any, **__: Any) -> Any:
        return _unchanged if function is None else function

    @staticmethod
    def assume_constant_result(function: Any) -> Any:
        return function

    @staticmethod
    def allow_in_graph(function: Any) -> Any:
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for such names, and does without
            raise AttributeError(name)
        return getattr(_real(_COMPILER), name)


class _Masks(ModuleType):
    """Stands for the module of the one class that masks need when they are made by ``vmap``, which ours are not."""

    @staticmethod
    def TransformGetItemToIndex() -> Any:  # their name
        return _real(_MASKS).TransformGetItemToIndex()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(_MASKS), name)


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _real(name: str) -> Any:
    for placeholder in (_COMPILER, _MASKS):
        if isinstance(sys.modules.get(placeholder), _Compiler | _Masks):
            del sys.modules[placeholder]
    return importlib.import_module(name)
