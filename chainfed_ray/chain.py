"""The window rule: which adapters are trained in which round. Integers only.

A **chain** is the adapters of layers ``start`` … ``layers - 1``. A **window** is ``width`` adjacent adapters, trained together
(DLCT, paper section 3.2). It slides by one, so neighbouring windows share ``width - 1`` adapters. A **stage** is a window with
its share of the job's rounds.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Window:
    """The adapters of layers ``bottom`` … ``top``, both included."""

    bottom: int
    top: int

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.bottom, self.top + 1))

    def __len__(self) -> int:
        return self.top - self.bottom + 1


@dataclass(frozen=True)
class Stage:
    """A window and the largest number of rounds that it may have."""

    index: int
    window: Window
    rounds: int


@dataclass(frozen=True)
class Chain:
    """The adapters of layers ``start`` … ``layers - 1``, trained ``width`` at a time.

    Raises:
        ValueError: the chain is shorter than one window, or ``start`` is negative.
    """

    layers: int
    start: int
    width: int

    def __post_init__(self) -> None:
        if not (self.start >= 0 and 1 <= self.width <= self.layers - self.start):
            raise ValueError(f"no window of {self.width} fits between layer {self.start} and layer {self.layers - 1}")

    @property
    def adapters(self) -> range:
        """The layers that have an adapter."""
        return range(self.start, self.layers)

    @property
    def windows(self) -> tuple[Window, ...]:
        """Every window, from the bottom to the top."""
        return tuple(Window(low, low + self.width - 1) for low in range(self.start, self.layers - self.width + 1))

    def staged(self, total: int, last_share: float) -> tuple[Stage, ...]:
        """The stages of the staged schedule, one for each window.

        The last stage gets ``last_share`` of the ``total`` rounds, because it is the only one that trains end to end. The
        others share the rest evenly. If there are fewer rounds than windows, the lowest windows are skipped.
        """
        windows = self.windows[-total:]
        if len(windows) == 1:
            return (Stage(0, windows[0], total),)
        others = len(windows) - 1
        last = min(max(round(total * last_share), 1), total - others)
        share, extra = divmod(total - last, others)
        rounds = [share + (index < extra) for index in range(others)] + [last]
        return tuple(
            Stage(index, window, count) for index, (window, count) in enumerate(zip(windows, rounds, strict=True))
        )

    def cyclic(self, round_index: int, total: int) -> Window:
        """The window of a round in the cyclic schedule, which slides every round and wraps round.

        The last of the ``total`` rounds has the top window.
        """
        windows = self.windows
        return windows[(round_index - total) % len(windows)]


def start_below(cka: tuple[float, ...], threshold: float, width: int) -> int:
    """The first layer whose CKA with the embedding output is below ``threshold`` (FOAT, paper section 3.4).

    The result is never above ``len(cka) - width``, the highest layer where a window still fits. That layer is also the result
    if no layer is below the threshold.
    """
    highest = len(cka) - width
    below = (layer for layer, similarity in enumerate(cka) if similarity < threshold)
    return min(next(below, highest), highest)
