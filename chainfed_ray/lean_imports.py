"""What clients and dry runs do without, though Hugging Face's modelling code would import it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import utils


@contextmanager
def without_scipy() -> Iterator[None]:
    """In this block transformers takes SciPy for not installed.

    The code of every model imports the losses of object detection, and these import SciPy wherever it is installed (Opacus
    brings it): 33 MiB and a second of CPU that are of no use here. So a model's code has to be imported in this block for the
    first time.
    """
    asked: Any = utils  # the losses ask it for `is_scipy_available`
    told = asked.is_scipy_available
    asked.is_scipy_available = lambda: False
    try:
        yield
    finally:
        asked.is_scipy_available = told
