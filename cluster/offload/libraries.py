"""DeepSpeed's compiled libraries for reading and writing disks: which they are, and how they are loaded without a compiler."""

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

# The second looks up functions of the first.
OPS = ("pin_memory", "async_io")


def library(name: str, folder: Path) -> Path:
    """Where the library called ``name`` is, of those that were compiled into ``folder``."""
    return folder / f"{name}.so"


def load_op(name: str, folder: Path) -> ModuleType:
    """The library called ``name``, which was compiled into ``folder``; loaded once in a process."""
    if name in sys.modules:
        return sys.modules[name]
    path = library(name, folder)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    sys.modules[name] = module
    return module
