"""What a client's process does without, though Hugging Face's modelling code would import it."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import utils


@contextmanager
def without_scipy() -> Iterator[None]:
    """In this block transformers takes SciPy for not installed.

    The code of every model imports the losses of object detection, and these import SciPy wherever it is installed (Opacus
    brings it): 33 MiB that no client uses. So the code of a client's model has to be imported in this block for the first time.
    """
    told = utils.is_scipy_available
    utils.is_scipy_available = lambda: False
    try:
        yield
    finally:
        utils.is_scipy_available = told
