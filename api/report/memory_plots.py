"""Plots of the clients' memory: each class compared with its budget, and every turn, round by round."""

from collections.abc import Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from chainfed_ray.api.report.figures import BLUE, GREEN, GREY, MANY, SEVERAL, by_round, new_figure
from chainfed_ray.api.report.fleet import FleetClass, by_class, short
from chainfed_ray.records.result import StageMemory
from chainfed_ray.records.rounds import JobStarted, Round
from chainfed_ray.units import format_bytes

_MIB = 2**20
_WIDE = 8  # if the largest value is more than this many times the smallest, the scale is logarithmic (base 2)
_ROOM = 1.7  # the axis ends at this many times the largest plan or peak; larger budgets are not drawn
_NAMED = 2  # how many of the budgets that are not drawn are named
_FEW_ROUNDS = 60  # with more rounds than this, points are small
_MARKERS = "osD^v"


def memory(job_started: JobStarted, rounds: Sequence[Round]) -> Figure:
    """The budget, the plan and the measured peak of each class."""
    classes = by_class(job_started, rounds)
    measured = [fleet for fleet in classes if fleet.peak is not None]
    kept = measured and all((fleet.peak or 0) <= fleet.budget for fleet in measured)
    figure, axes = new_figure(
        "Every client kept to its budget" if kept else "Memory of a client's turn, against its budget"
    )
    bars = (
        ("budget", "#dddddd", [fleet.budget for fleet in classes]),
        ("planned", GREEN, [fleet.planned or fleet.budget + fleet.shortfall for fleet in classes]),
        ("measured peak", BLUE, [fleet.peak or 0 for fleet in classes]),
    )
    for number, (label, colour, values) in enumerate(bars):
        places = [place + (number - 1) * 0.27 for place in range(len(classes))]
        drawn = axes.bar(places, [value / _MIB for value in values], width=0.25, color=colour)
        for bar, value, fleet in zip(drawn, values, classes, strict=True):
            if not fleet.clients and label == "planned":
                bar.set(fill=False, edgecolor=GREEN, linestyle="--")
            if value and len(classes) <= MANY // 2:
                axes.annotate(
                    f"{value / _MIB:.0f}", (bar.get_x() + bar.get_width() / 2, value / _MIB), (0, 3),
                    textcoords="offset points", ha="center", fontsize=9,
                )  # fmt: skip
    names = [short(fleet.name) + (f"\n{fleet.excluded} excluded" if fleet.excluded else "") for fleet in classes]
    crowded = len(classes) > MANY // 2
    axes.set_xticks(range(len(classes)), names, rotation=45 if crowded else 0, ha="right" if crowded else "center")
    budgets = [fleet.budget for fleet in classes]
    if budgets and max(budgets) > _WIDE * min(budgets):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("MiB above the idle process")
    handles = [Patch(color=colour, label=label) for label, colour, _ in bars]
    axes.legend(handles=handles, frameon=False, loc="upper left")
    if any(not fleet.clients for fleet in classes):
        axes.set_xlabel("dashed: what the smallest window would need", fontsize=9)
    return figure


def memory_by_round(job_started: JobStarted, rounds: Sequence[Round]) -> Figure:
    """The measured peak of every turn, with the plan of its class and stage, and the budget of its class."""
    classes = [fleet for fleet in by_class(job_started, rounds) if fleet.turns]
    figure, axes = new_figure(_title(rounds))
    by_round(axes, rounds)
    planned = {(part.stage, part.client_class): part.planned_bytes / _MIB for part in StageMemory.of(rounds)}
    edges = [place + 0.5 for place in range(len(rounds) + 1)]
    for number, (fleet, colour, marker) in enumerate(zip(classes, cycle(SEVERAL), cycle(_MARKERS), strict=False)):
        # Classes may have equal plans and peaks: lines get different widths, and points of one round stand side by side.
        width, aside = 1.5 + 1.5 * max(2 - number, 0), 0.6 * (number + 0.5) / len(classes) - 0.3
        steps = [planned.get((record.stage, fleet.name), float("nan")) for record in rounds]
        axes.stairs(steps, edges, baseline=None, color=colour, linewidth=width, alpha=0.6)
        axes.axhline(fleet.budget / _MIB, color=colour, linestyle="--", linewidth=1.5)
        for retried in (False, True):
            points = [
                (record.index + 1 + aside, turn.peak_bytes / _MIB)
                for record in rounds
                for turn in record.turns
                if turn.client_class == fleet.name and turn.peak_bytes is not None and retried == bool(turn.exceeded)
            ]
            axes.plot(
                [place for place, _ in points], [peak for _, peak in points], color=colour, marker=marker,
                markersize=6 if len(rounds) <= _FEW_ROUNDS else 3, markerfacecolor="white" if retried else colour,
                linestyle="none",
            )  # fmt: skip
    _frame(axes, classes)
    _explain(axes, classes)
    return figure


def _title(rounds: Sequence[Round]) -> str:
    turns = [turn for record in rounds for turn in record.turns if turn.peak_bytes is not None]
    retried = sum(turn.exceeded is not None for record in rounds for turn in record.turns)
    if retried:
        return f"{retried} turn{'s' if retried > 1 else ''} exceeded the plan and ran again with a fallback plan"
    kept = turns and all((turn.peak_bytes or 0) <= turn.planned_bytes for turn in turns)
    return "Every turn kept to its plan" if kept else "Memory of every turn, round by round"


def _frame(axes: Axes, classes: Sequence[FleetClass]) -> None:
    """Scale the y axis to the plans and peaks. Budgets far above them are named instead of drawn."""
    axes.set_ylabel("MiB above the idle process")
    if not classes:
        return
    used = [max(fleet.planned, fleet.peak or 0) for fleet in classes]
    top = _ROOM * max(used)
    if max(used) > _WIDE * min(used):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(min(used) / 4 / _MIB, top / _MIB)
    else:
        axes.set_ylim(0, top / _MIB)
    above = [f"{short(fleet.name)} {format_bytes(fleet.budget)}" for fleet in classes if fleet.budget > top]
    if above:
        named = ", ".join(above[:_NAMED]) + (f" and {len(above) - _NAMED} more" if len(above) > _NAMED else "")
        axes.text(
            0.99, 0.98, f"budgets above this scale: {named}", ha="right", va="top", fontsize=9, transform=axes.transAxes
        )


def _explain(axes: Axes, classes: Sequence[FleetClass]) -> None:
    """Add a legend: the colour of each class, and what the lines and points mean."""
    marks = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=short(fleet.name))
        for fleet, colour, marker in zip(classes, cycle(SEVERAL), cycle(_MARKERS), strict=False)
    ]
    marks += [
        Line2D([], [], color=GREY, linestyle="--", label="budget"),
        Line2D([], [], color=GREY, linewidth=3, alpha=0.6, label="planned"),
        Line2D([], [], color=GREY, marker="o", linestyle="none", label="peak of a turn"),
    ]
    if any(fleet.retried for fleet in classes):
        marks.append(
            Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="none", label="… run again")
        )
    axes.figure.legend(handles=marks, frameon=False, loc="outside right upper", fontsize=9)
