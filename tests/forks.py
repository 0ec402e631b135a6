"""Does pieces of work in a process each, all of them copies of one that has loaded the libraries."""

import gc
from collections.abc import Callable, Sequence
from multiprocessing import get_context

from chainfed_ray.device.lean_imports import load_models


def in_forks(pieces: Sequence[str], work: Callable[[str], None]) -> None:
    """Do ``work`` for each piece, one after the other, as a client's process does its own: it is a fork as well.

    Raises:
        RuntimeError: one of them failed. It has printed why.
    """
    load_models()
    gc.collect()
    gc.freeze()
    for piece in pieces:
        process = get_context("fork").Process(target=work, args=(piece,))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{piece} failed")
