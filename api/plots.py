"""Three pictures of a job: accuracy along the chain, where the chain starts and why, memory against budgets."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from api.fleet import by_class
from chainfed_ray.records import Ending, Opening, Round

_SIZE, _DPI = (8.0, 5.0), 150
# Safe for colour-blind readers (Okabe and Ito, 2008).
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#E69F00", "#009E73", "#999999"
_MIB = 2**20
_LABELLED_BANDS = 12
_NAME_LENGTH = 14


def draw(
    folder: Path, opening: Opening, rounds: Sequence[Round], ending: Ending | None, threshold: float
) -> list[Path]:
    """Write the pictures into ``folder`` and give their paths; without a CKA profile there is none of the start."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"accuracy.png": _accuracy(opening, rounds, ending), "memory.png": _memory(opening, rounds)}
    if opening.similarities:
        figures["start-layer.png"] = _start(opening, threshold)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=_DPI)
    return [folder / name for name in figures]


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=13, pad=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _accuracy(opening: Opening, rounds: Sequence[Round], ending: Ending | None) -> Figure:
    figure, axes = _figure(
        "Accuracy along the chain" if ending is None else f"Along the chain to {ending.accuracy:.1%} on the test rows"
    )
    points = [(record.index + 1, record.accuracy) for record in rounds if record.accuracy is not None]
    axes.plot(
        [place for place, _ in points], [value for _, value in points], color=_BLUE, marker="o", markersize=4,
        label="validation rows",
    )  # fmt: skip
    bands = _bands(rounds)
    for number, (first, last, window) in enumerate(bands):
        axes.axvspan(first - 0.5, last + 0.5, color=_GREY, alpha=0.14 if number % 2 else 0.04, linewidth=0)
        if len(bands) <= _LABELLED_BANDS:
            axes.text((first + last) / 2, 0.02, f"layers\n{window}", ha="center", fontsize=8, color="#555555")
    if ending is not None:
        axes.plot(
            [len(rounds)], [ending.accuracy], color=_ORANGE, marker="D", markersize=9, linestyle="none",
            label="test rows, whole chain",
        )  # fmt: skip
    axes.set(xlabel="round", ylabel="share classified right", ylim=(0, 1), xlim=(0.5, max(len(rounds), 1) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if points or ending:
        axes.legend(frameon=False, loc="upper left")
    return figure


def _bands(rounds: Sequence[Round]) -> list[tuple[int, int, str]]:
    """Stretches of rounds with the same window: the first, the last, the window's layers."""
    bands: list[tuple[int, int, str]] = []
    for record in rounds:
        window, place = f"{record.bottom}–{record.top}", record.index + 1
        if bands and bands[-1][2] == window:
            bands[-1] = (bands[-1][0], place, window)
        else:
            bands.append((place, place, window))
    return bands


def _start(opening: Opening, threshold: float) -> Figure:
    figure, axes = _figure(f"The chain starts at layer {opening.start_layer}")
    layers = range(opening.layers)
    colours = [_BLUE if layer >= opening.start_layer else _GREY for layer in layers]
    axes.bar(layers, opening.similarities, color=colours, width=0.7)
    axes.axhline(threshold, color=_ORANGE, linestyle="--", label=f"threshold {threshold:g}")
    axes.set(xlabel="layer (blue: has an adapter)", ylabel="CKA with the embeddings", ylim=(0, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if opening.layers <= 2 * _LABELLED_BANDS:
        for layer, value in enumerate(opening.similarities):
            axes.text(layer, max(value, 0) + 0.015, f"{value:.2f}", ha="center", fontsize=9)
    axes.legend(frameon=False, loc="upper right")
    return figure


def _memory(opening: Opening, rounds: Sequence[Round]) -> Figure:
    classes = by_class(opening, rounds)
    measured = [fleet for fleet in classes if fleet.peak is not None]
    kept = measured and all((fleet.peak or 0) <= fleet.budget for fleet in measured)
    figure, axes = _figure(
        "Every client kept to its budget" if kept else "Memory of a client's turn, against its budget"
    )
    bars = (
        ("budget", "#dddddd", [fleet.budget for fleet in classes]),
        ("planned", _GREEN, [fleet.planned or fleet.budget + fleet.lacking for fleet in classes]),
        ("measured peak", _BLUE, [fleet.peak or 0 for fleet in classes]),
    )
    for number, (label, colour, values) in enumerate(bars):
        places = [place + (number - 1) * 0.27 for place in range(len(classes))]
        drawn = axes.bar(places, [value / _MIB for value in values], width=0.25, color=colour)
        for bar, value, fleet in zip(drawn, values, classes, strict=True):
            if not fleet.clients and label == "planned":
                bar.set(fill=False, edgecolor=_GREEN, linestyle="--")
            if value and len(classes) <= _LABELLED_BANDS // 2:
                axes.annotate(
                    f"{value / _MIB:.0f}", (bar.get_x() + bar.get_width() / 2, value / _MIB), (0, 3),
                    textcoords="offset points", ha="center", fontsize=9,
                )  # fmt: skip
    names = [_short(fleet.name) + (f"\n{fleet.left_out} left out" if fleet.left_out else "") for fleet in classes]
    crowded = len(classes) > _LABELLED_BANDS // 2
    axes.set_xticks(range(len(classes)), names, rotation=45 if crowded else 0, ha="right" if crowded else "center")
    budgets = [fleet.budget for fleet in classes]
    if budgets and max(budgets) > 8 * min(budgets):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("MiB above the idle process")
    handles = [Patch(color=colour, label=label) for label, colour, _ in bars]
    axes.legend(handles=handles, frameon=False, loc="upper left")
    if any(not fleet.clients for fleet in classes):
        axes.set_xlabel("dashed: what the smallest window would need", fontsize=9)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
