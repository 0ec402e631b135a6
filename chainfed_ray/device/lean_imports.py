"""Keeps libraries that a turn never uses out of the processes that this package starts: half of what they would load."""

import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from threading import RLock
from types import ModuleType
from typing import Any

from chainfed_ray.device.model_list import keep_model_list

_SHARED = ("modeling_layers", "masking_utils", "generation.utils")  # modules of transformers that every model imports
_COMPILER = "torch._dynamo"
_MASKS = "torch._dynamo._trace_wrapped_higher_order_op"  # transformers' masks take one class from it
_ONE_THREAD = RLock()  # placeholders leave together
_SETTINGS = "torch._dynamo.config"
_SHAPES = "torch.fx.experimental.symbolic_shapes"  # what torch asks about sizes that it may not know
_ALGEBRA = "sympy"  # it stands for such sizes
_HIDDEN = ("is_accelerate_available", "is_scipy_available", "is_torch_distributed_available")


def load_models() -> None:
    """Load what the models of transformers have in common, without what they do not need, for the life of this process.

    Every model of transformers imports Accelerate, SciPy and torch's distributed tensors if they are installed, and torch's
    compiler. That and SymPy also come with the first tensor that has a shape but no values: tens of MiB and seconds of CPU
    time. In a process that has called this, transformers' shared modules believe that the first three are not installed,
    the compiler is loaded when something compiles, and SymPy when a size is not known. So this is for processes that this
    package starts, and not for a user's own.
    Call it before a model's code is imported; later it changes nothing.
    """
    if _COMPILER in sys.modules:
        return
    for name, given in _GIVEN.items():
        sys.modules.setdefault(name, _Placeholder(name, given))
    sys.meta_path.insert(0, _Finder)
    keep_model_list()
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


class _Placeholder(ModuleType):
    """Stands for a module until something needs more of it than the names in ``given``.

    Any other name, and any other module of a package, loads the module, which takes this one's place.
    """

    def __init__(self, name: str, given: Mapping[str, Any]) -> None:
        super().__init__(name)
        self._given = given
        if name in _PACKAGES:
            self.__path__: list[str] = []  # or the import system would not take it for a package
        if "." not in name:
            self.__spec__ = PathFinder.find_spec(name)  # for who asks where the package is, without loading it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for such names, and does without
            raise AttributeError(name)
        if f"{self.__name__}.{name}" == _SETTINGS:  # gradient checkpointing asks for a setting, in the middle of a turn
            return importlib.import_module(_SETTINGS)
        # A module that was loaded meanwhile has the names that others know.
        if name in self._given and sys.modules.get(self.__name__) is self:
            return self._given[name]
        return getattr(_real(self.__name__), name)


class _Finder:
    """Finds the modules of packages for which a placeholder stands. ``sys.meta_path`` has this class."""

    @staticmethod
    def find_spec(name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        top = next((package for package in _PACKAGES if name.startswith(f"{package}.")), None)
        if top is None or not isinstance(sys.modules.get(top), _Placeholder):
            return None
        if name == _SETTINGS:
            package = find_spec("torch")
            assert package is not None
            return PathFinder.find_spec(
                name, [f"{where}/_dynamo" for where in package.submodule_search_locations or ()]
            )
        package = _real(top)
        if name in sys.modules:  # the package has loaded it
            return ModuleSpec(name, _Loaded(sys.modules[name]))
        return PathFinder.find_spec(name, package.__path__)


class _Loaded(Loader):
    """Gives the import system a module that is loaded already.

    The module is without its own specification meanwhile, or the import system would take that one and run it again.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__
        module.__spec__ = None

    def create_module(self, _spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _real(name: str) -> Any:
    """The module for which a placeholder stood. Its companions leave with it.

    A thread that imports one of them meanwhile would otherwise wait for this one, and this one for it.
    """
    with _ONE_THREAD:
        for companion in (_SHAPES, _ALGEBRA) if name in (_SHAPES, _ALGEBRA) else _GIVEN:
            if isinstance(sys.modules.get(companion), _Placeholder):
                del sys.modules[companion]
    return importlib.import_module(name)


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _disable(function: Any = None, *_: Any, **__: Any) -> Any:
    return _unchanged if function is None else function


def _by_arithmetic(name: str, arithmetic: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the module of shapes: arithmetic where all sizes are known, and its own answer where one is not."""

    def answer(*values: Any, **options: Any) -> Any:
        known = not options and all(map(_is_known, values))
        return (arithmetic if known else getattr(_real(_SHAPES), name))(*values, **options)

    return answer


def _is_known(value: Any) -> bool:
    """Whether a size, a condition, or each size of a shape has a value."""
    return all(map(_is_known, value)) if isinstance(value, tuple | list) else isinstance(value, int)


def _are_equal(one: Any, other: Any) -> bool:
    """Of two sizes, or of two shapes in whatever form."""
    return bool(one == other) if isinstance(one, int) or isinstance(other, int) else list(one) == list(other)


class _Unknown:
    """Stands for the class of all that SymPy makes. As long as it is not loaded, it has made nothing."""


_PACKAGES = (_COMPILER, _ALGEBRA)
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "expect_true": bool,
    "guard_or_false": bool,
    "guard_or_true": bool,
    "guard_size_oblivious": bool,
    "guarding_hint_or_throw": lambda size: size,
    "has_guarding_hint": lambda _: True,
    "is_nested_int": lambda _: False,
    "statically_known_true": bool,
    "sym_and": lambda *conditions: all(conditions),
    "sym_eq": _are_equal,
    "sym_or": lambda *conditions: any(conditions),
}
# Marks tell the compiler what to leave alone, so without it functions stay as they are. Masks need their class when they
# are made by `vmap`, which ours are not.
_GIVEN: dict[str, dict[str, Any]] = {
    _COMPILER: {"disable": _disable, "assume_constant_result": _unchanged, "allow_in_graph": _unchanged},
    _MASKS: {"TransformGetItemToIndex": lambda: _real(_MASKS).TransformGetItemToIndex()},
    _SHAPES: {name: _by_arithmetic(name, arithmetic) for name, arithmetic in _ARITHMETIC.items()},
    _ALGEBRA: {"Basic": _Unknown},
}
