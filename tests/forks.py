"""Does pieces of work in a process each, all of them copies of one that has loaded the libraries."""

import gc
import os
import traceback
from collections.abc import Callable, Sequence

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
        child = os.fork()
        if not child:
            try:
                work(piece)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"{piece} failed")
