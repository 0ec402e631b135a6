"""Keeps libraries that a turn never uses out of the processes that this package starts: half of what they would load."""

import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from threading import RLock
from types import ModuleType
from typing import Any

_SHARED = ("modeling_layers", "masking_utils", "generation.utils")  # modules of transformers that every model imports
_COMPILER = "torch._dynamo"
_MASKS = "torch._dynamo._trace_wrapped_higher_order_op"  # transformers' masks take one class from it
_ONE_THREAD = RLock()  # what takes a placeholder's place is loaded once, and whole before anybody has it
_SETTINGS = "torch._dynamo.config"
_HIDDEN = ("is_accelerate_available", "is_scipy_available", "is_torch_distributed_available")


def load_models() -> None:
    """Load what the models of transformers have in common, without what they do not need, for the life of this process.

    Every model of transformers imports Accelerate, SciPy and torch's distributed tensors if they are installed, and torch's
    compiler, which also comes with the first tensor that has a shape but no values: tens of MiB and seconds of CPU time.
    In a process that has called this, transformers' shared modules believe that the first three are not installed, and
    the compiler is loaded when something compiles. So this is for processes that this package starts, and not for a user's own.
    Call it before a model's code is imported; later it changes nothing.
    """
    if _COMPILER in sys.modules:
        return
    sys.modules |= {_COMPILER: _Compiler(_COMPILER), _MASKS: _Masks(_MASKS)}
    sys.meta_path.insert(0, _Finder)
    import transformers.utils  # noqa: F401  # has the functions; here, so that to import this file costs nothing

    # The functions are looked up in transformers.utils, and in modules that were imported before and have them from there.
    loaded = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("transformers.")]
    originals = [(names, name, names[name]) for names in loaded for name in _HIDDEN if name in names]
    for names, name, _ in originals:
        names[name] = lambda *_: False
    try:
        for name in _SHARED:
            importlib.import_module(f"transformers.{name}")
    finally:
        for names, name, original in originals:
            names[name] = original


class _Compiler(ModuleType):
    """Stands for the package ``torch._dynamo`` until something needs more of it than to mark a function, or its settings.

    Marks tell the compiler what to leave alone, so without it functions stay as they are. Any other name, and any other
    module of the package, loads the package, which takes this module's place.
    """

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
        return getattr(_compiler(), name)


class _Masks(ModuleType):
    """Stands for the module of the one class that masks need when they are made by ``vmap``, which ours are not."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "TransformGetItemToIndex":
            return lambda: _masks().TransformGetItemToIndex()
        return getattr(_masks(), name)


class _Finder:
    """Finds the modules of ``torch._dynamo`` while a placeholder stands for it. ``sys.meta_path`` has this class."""

    @staticmethod
    def find_spec(name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        if not name.startswith(f"{_COMPILER}.") or not isinstance(sys.modules.get(_COMPILER), _Compiler):
            return None
        if name == _SETTINGS:
            package = find_spec("torch")
            assert package is not None
            return PathFinder.find_spec(
                name, [f"{where}/_dynamo" for where in package.submodule_search_locations or ()]
            )
        package = _compiler()
        if name in sys.modules:  # the package has loaded it
            return ModuleSpec(name, _Loaded(sys.modules[name]))
        return PathFinder.find_spec(name, package.__path__)


class _Loaded(Loader):
    """Gives the import system a module that is loaded already."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, _spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _compiler() -> Any:
    return _real(_COMPILER)


def _masks() -> Any:
    return _real(_MASKS)


def _real(name: str) -> Any:
    with _ONE_THREAD:
        # Both go: a thread that imports the package meanwhile would otherwise wait for this one, and this one for it.
        for placeholder in (_COMPILER, _MASKS):
            if isinstance(sys.modules.get(placeholder), _Compiler | _Masks):
                del sys.modules[placeholder]
        return importlib.import_module(name)
