"""Keeps an unneeded library, SciPy, out of the processes of clients and dry runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import utils


@contextmanager
def without_scipy() -> Iterator[None]:
    """Make transformers believe that SciPy is not installed, for the length of the block.

    Every model of transformers imports the losses of object detection, and these import SciPy if it is installed (Opacus brings
    it): 33 MiB of memory and a second of CPU time for nothing. Import a model's code for the first time inside this block.
    """
    module: Any = utils  # where the losses look up `is_scipy_available`
    original = module.is_scipy_available
    module.is_scipy_available = lambda: False
    try:
        yield
    finally:
        module.is_scipy_available = original
