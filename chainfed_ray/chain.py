"""The window rule: which adapters are trained in which round. Integers only.

A **chain** is the adapters of layers ``start`` … ``layers - 1``. A **window** is ``width`` adjacent adapters, trained together
(DLCT, paper section 3.2). The paper slides it up by one, so neighbouring windows share ``width - 1`` adapters. A **stage** is a
window with its share of the job's rounds. The **exit** of a window is the layer on whose output its loss is computed: the
window's top or, with an exact look-ahead, the model's last layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

LookAhead = Literal["none", "adapters", "exact"]
"""What a window's loss knows of the layers above: nothing, their adapters as stand-ins (GPO), or the layers themselves."""
Direction = Literal["up", "down"]
"""Which way a window slides."""


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
    """The window at the place ``index`` of the schedule, and the largest number of rounds that it may have."""

    index: int
    window: Window
    rounds: int


@dataclass(frozen=True)
class Chain:
    """The adapters of layers ``start`` … ``layers - 1``, trained ``width`` at a time.

    The window slides by ``slide`` layers in ``direction``.

    Raises:
        ValueError: the chain is shorter than one window, ``start`` is negative, or ``slide`` is not positive.
    """

    layers: int
    start: int
    width: int
    slide: int = 1
    direction: Direction = "up"
    look_ahead: LookAhead = "adapters"

    def __post_init__(self) -> None:
        if not (self.start >= 0 and 1 <= self.width <= self.layers - self.start):
            raise ValueError(f"no window of {self.width} fits between layer {self.start} and layer {self.layers - 1}")
        if self.slide < 1:
            raise ValueError(f"a window slides by 1 layer or more, not by {self.slide}")

    @property
    def adapters(self) -> range:
        """The layers that have an adapter."""
        return range(self.start, self.layers)

    @property
    def windows(self) -> tuple[Window, ...]:
        """Every window, in the order in which they are trained.

        One is at the model's top, and one at the chain's start, which may be nearer to its neighbour than ``slide``.
        """
        bottoms = [*range(self.layers - self.width, self.start, -self.slide), self.start]
        downwards = [Window(bottom, bottom + self.width - 1) for bottom in bottoms]
        return tuple(downwards if self.direction == "down" else reversed(downwards))

    @property
    def lowest(self) -> Window:
        """The window at the chain's start. It has the most layers and adapters above it."""
        return Window(self.start, self.start + self.width - 1)

    def exit(self, window: Window) -> int:
        """The layer on whose output the loss of ``window`` is computed."""
        return self.layers - 1 if self.look_ahead == "exact" else window.top

    def staged(self, total: int, last_share: float) -> tuple[Stage, ...]:
        """The stages of the staged schedule, one for each window.

        The last stage gets ``last_share`` of the ``total`` rounds, because without an exact look-ahead it is the only one that
        trains end to end. The others share the rest evenly. If there are fewer rounds than windows, the lowest windows are
        skipped.
        """
        windows = self.windows[:total] if self.direction == "down" else self.windows[-total:]
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

        The last of the ``total`` rounds has the last window.
        """
        windows = self.windows
        return windows[(round_index - total) % len(windows)]

    def cycled(self, total: int) -> tuple[Stage, ...]:
        """The windows of the cyclic schedule that have any of its ``total`` rounds, each with how many it has."""
        windows = self.windows
        each, more = divmod(total, len(windows))  # the last window ends the job, so the last ones have one more
        rounds = [each + (index >= len(windows) - more) for index in range(len(windows))]
        return tuple(Stage(index, windows[index], count) for index, count in enumerate(rounds) if count)


def start_below(cka: tuple[float, ...], threshold: float, width: int) -> int:
    """The first layer whose CKA with the embedding output is below ``threshold`` (FOAT, paper section 3.4).

    The result is never above ``len(cka) - width``, the highest layer where a window still fits. That layer is also the result
    if no layer is below the threshold.
    """
    highest = len(cka) - width
    below = (layer for layer, similarity in enumerate(cka) if similarity < threshold)
    return min(next(below, highest), highest)
