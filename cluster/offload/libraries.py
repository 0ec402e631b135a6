"""Names DeepSpeed's compiled libraries for reading and writing disks, and loads them without a compiler."""

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

# In this order, because the second looks up functions of the first.
OPS = ("pin_memory", "async_io")


def library(name: str, folder: Path) -> Path:
    """The file of the library ``name``, compiled into ``folder``."""
    return folder / f"{name}.so"


def load_op(name: str, folder: Path) -> ModuleType:
    """Load the library ``name`` from ``folder``. A second call in a process returns the loaded one."""
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
