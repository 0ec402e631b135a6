"""Plots of a job: accuracy along the chain, where the chain starts and why, and the clients' memory."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chainfed_ray.api.report.figures import BLUE, GREY, MANY, ORANGE, by_round, new_figure
from chainfed_ray.api.report.memory_plots import memory, memory_by_round
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round

_DPI = 150


def draw(
    folder: Path, job_started: JobStarted, rounds: Sequence[Round], job_finished: JobFinished | None, threshold: float
) -> list[Path]:
    """Write the plots into ``folder`` as PNG files, and return their paths.

    ``threshold`` is the job's CKA threshold. If the job's file names the start layer, there is no plot of the start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "accuracy.png": _accuracy(rounds, job_finished),
        "memory.png": memory(job_started, rounds),
        "memory-by-round.png": memory_by_round(job_started, rounds),
    }
    if job_started.cka:
        figures["start-layer.png"] = _similarities(job_started, threshold)
    elif job_started.exits:
        figures["start-layer.png"] = _exits(job_started)
    for name, figure in figures.items():
        try:
            figure.savefig(folder / name, dpi=_DPI)
        except OSError:
            (folder / name).unlink(missing_ok=True)  # half a plot is none
            raise
    return [folder / name for name in figures]


def _accuracy(rounds: Sequence[Round], job_finished: JobFinished | None) -> Figure:
    figure, axes = new_figure(
        "Accuracy along the chain"
        if job_finished is None
        else f"Along the chain to {job_finished.accuracy:.1%} on the test rows"
    )
    points = [(record.index + 1, record.accuracy) for record in rounds if record.accuracy is not None]
    axes.plot(
        [place for place, _ in points], [value for _, value in points], color=BLUE, marker="o", markersize=4,
        label="validation rows",
    )  # fmt: skip
    by_round(axes, rounds)
    if job_finished is not None:
        axes.plot(
            [len(rounds)], [job_finished.accuracy], color=ORANGE, marker="D", markersize=9, linestyle="none",
            label="test rows, whole chain",
        )  # fmt: skip
    axes.set(ylabel="accuracy", ylim=(0, 1))
    if points or job_finished:
        axes.legend(frameon=False, loc="upper left")
    return figure


def _similarities(job_started: JobStarted, threshold: float) -> Figure:
    figure, axes = _by_layer(job_started, job_started.cka, places=2)
    axes.axhline(threshold, color=ORANGE, linestyle="--", label=f"threshold {threshold:g}")
    axes.set(xlabel="layer (blue: has an adapter)", ylabel="CKA with the embeddings", ylim=(0, 1.05))
    axes.legend(frameon=False, loc="upper right")
    return figure


def _exits(job_started: JobStarted) -> Figure:
    losses = [math.nan if fit.held_out_loss is None else fit.held_out_loss for fit in job_started.exits]
    figure, axes = _by_layer(job_started, losses, places=3)
    axes.set(
        xlabel="lowest layer of the window (blue: has an adapter)", ylabel="held-out loss of a head fitted to its top"
    )
    return figure


def _by_layer(job_started: JobStarted, values: Sequence[float], places: int) -> tuple[Figure, Axes]:
    """A bar for each of the lowest layers, labelled with ``places`` decimals; blue from the layer where the chain starts."""
    figure, axes = new_figure(f"The chain starts at layer {job_started.start_layer}")
    colours = [BLUE if layer >= job_started.start_layer else GREY for layer in range(len(values))]
    axes.bar(range(len(values)), values, color=colours, width=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(values) <= 2 * MANY:
        for place, value in enumerate(values):
            label, height = ("none", 0.0) if math.isnan(value) else (f"{value:.{places}f}", max(value, 0.0))
            axes.annotate(label, (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=9)
    return figure, axes
