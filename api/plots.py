"""Pictures of a job: accuracy along the chain, where the chain starts and why, and clients' memory."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from api.figures import BLUE, GREY, MANY, ORANGE, by_round, new_figure
from api.memory_plots import memory, memory_by_round
from chainfed_ray.records import Ending, Opening, Round

_DPI = 150


def draw(
    folder: Path, opening: Opening, rounds: Sequence[Round], ending: Ending | None, threshold: float
) -> list[Path]:
    """Write the pictures into ``folder`` and give their paths; without a CKA profile there is none of the start."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "accuracy.png": _accuracy(rounds, ending),
        "memory.png": memory(opening, rounds),
        "memory-by-round.png": memory_by_round(opening, rounds),
    }
    if opening.similarities:
        figures["start-layer.png"] = _start(opening, threshold)
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


def _start(opening: Opening, threshold: float) -> Figure:
    figure, axes = new_figure(f"The chain starts at layer {opening.start_layer}")
    layers = range(opening.layers)
    colours = [BLUE if layer >= opening.start_layer else GREY for layer in layers]
    axes.bar(layers, opening.similarities, color=colours, width=0.7)
    axes.axhline(threshold, color=ORANGE, linestyle="--", label=f"threshold {threshold:g}")
    axes.set(xlabel="layer (blue: has an adapter)", ylabel="CKA with the embeddings", ylim=(0, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if opening.layers <= 2 * MANY:
        for layer, value in enumerate(opening.similarities):
            axes.text(layer, max(value, 0) + 0.015, f"{value:.2f}", ha="center", fontsize=9)
    axes.legend(frameon=False, loc="upper right")
    return figure
