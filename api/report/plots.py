"""Pictures of a job: accuracy along the chain, where the chain starts and why, and clients' memory."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chainfed_ray.api.report.figures import BLUE, GREY, MANY, ORANGE, by_round, new_figure
from chainfed_ray.api.report.memory_plots import memory, memory_by_round
from chainfed_ray.records.rounds import Ending, Opening, Round

_DPI = 150


def draw(
    folder: Path, opening: Opening, rounds: Sequence[Round], ending: Ending | None, threshold: float
) -> list[Path]:
    """Write the pictures into ``folder`` and give their paths; there is none of a start that the job gives."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "accuracy.png": _accuracy(rounds, ending),
        "memory.png": memory(opening, rounds),
        "memory-by-round.png": memory_by_round(opening, rounds),
    }
    if opening.similarities:
        figures["start-layer.png"] = _similarities(opening, threshold)
    elif opening.exits:
        figures["start-layer.png"] = _exits(opening)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=_DPI)
    return [folder / name for name in figures]


def _accuracy(rounds: Sequence[Round], ending: Ending | None) -> Figure:
    figure, axes = new_figure(
        "Accuracy along the chain" if ending is None else f"Along the chain to {ending.accuracy:.1%} on the test rows"
    )
    points = [(record.index + 1, record.accuracy) for record in rounds if record.accuracy is not None]
    axes.plot(
        [place for place, _ in points], [value for _, value in points], color=BLUE, marker="o", markersize=4,
        label="validation rows",
    )  # fmt: skip
    by_round(axes, rounds)
    if ending is not None:
        axes.plot(
            [len(rounds)], [ending.accuracy], color=ORANGE, marker="D", markersize=9, linestyle="none",
            label="test rows, whole chain",
        )  # fmt: skip
    axes.set(ylabel="share classified right", ylim=(0, 1))
    if points or ending:
        axes.legend(frameon=False, loc="upper left")
    return figure


def _similarities(opening: Opening, threshold: float) -> Figure:
    figure, axes = _by_layer(opening, opening.similarities, places=2)
    axes.axhline(threshold, color=ORANGE, linestyle="--", label=f"threshold {threshold:g}")
    axes.set(xlabel="layer (blue: has an adapter)", ylabel="CKA with the embeddings", ylim=(0, 1.05))
    axes.legend(frameon=False, loc="upper right")
    return figure


def _exits(opening: Opening) -> Figure:
    losses = [math.nan if fit.held_out_loss is None else fit.held_out_loss for fit in opening.exits]
    figure, axes = _by_layer(opening, losses, places=3)
    axes.set(
        xlabel="lowest layer of the window (blue: has an adapter)", ylabel="held-out loss of a head fitted to its top"
    )
    return figure


def _by_layer(opening: Opening, values: Sequence[float], places: int) -> tuple[Figure, Axes]:
    """A bar for each of the lowest layers, with so many decimal ``places``, blue from where the chain starts."""
    figure, axes = new_figure(f"The chain starts at layer {opening.start_layer}")
    colours = [BLUE if layer >= opening.start_layer else GREY for layer in range(len(values))]
    axes.bar(range(len(values)), values, color=colours, width=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(values) <= 2 * MANY:
        for place, value in enumerate(values):
            label, height = ("none", 0.0) if math.isnan(value) else (f"{value:.{places}f}", max(value, 0.0))
            axes.annotate(label, (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=9)
    return figure, axes
