"""What all plots share: size, colours, axes, and the background bands that mark the windows of the chain."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chainfed_ray.records.rounds import Round

_SIZE = (8.0, 5.0)  # inches
# This palette is safe for colour-blind readers (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"
SEVERAL = (BLUE, ORANGE, GREEN, "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MANY = 12  # with more bands or bars than this, labels have no room
_FOOT = 0.02  # where the bands' labels stand, as a share of the axes' height


def new_figure(title: str) -> tuple[Figure, Axes]:
    """An empty figure with a title, and its axes."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=13, pad=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def by_round(axes: Axes, rounds: Sequence[Round]) -> None:
    """Let the x axis count rounds, and mark stretches of rounds that trained the same window with bands."""
    bands = _bands(rounds)
    for number, (first, last, window) in enumerate(bands):
        axes.axvspan(first - 0.5, last + 0.5, color=GREY, alpha=0.14 if number % 2 else 0.04, linewidth=0)
        if len(bands) <= MANY:
            axes.text(
                (first + last) / 2, _FOOT, f"layers\n{window}", ha="center", fontsize=8, color="#555555",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
    axes.set(xlabel="round", xlim=(0.5, max(len(rounds), 1) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _bands(rounds: Sequence[Round]) -> list[tuple[int, int, str]]:
    """Stretches of rounds with the same window: the first round, the last round, and the window's layers."""
    bands: list[tuple[int, int, str]] = []
    for record in rounds:
        window, place = f"{record.bottom}–{record.top}", record.index + 1
        if bands and bands[-1][2] == window:
            bands[-1] = (bands[-1][0], place, window)
        else:
            bands.append((place, place, window))
    return bands
