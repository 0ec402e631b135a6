"""Draws the forecast of a dry run: for each class of clients its budget, and the parts of its planned memory."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from chainfed_ray.api.report.figures import BLUE, GREEN, GREY, MANY, ORANGE, new_figure
from chainfed_ray.api.report.fleet import short
from chainfed_ray.records.forecast import PREFIX, ClassForecast, Forecast
from chainfed_ray.units import format_bytes

_DPI = 150
_MIB = 2**20
_ROOM = 1.35  # the axis ends at this many times the largest plan; larger budgets are cut off there
_BAR = 0.36  # the width of a bar; classes are 1 apart
_ASIDE = 0.2  # how far a bar's middle is from the middle of its class
_BUDGET = "#e3e3e3"

# The parts of a bar, from the bottom up: label, colour, and the planner's names of what the part sums up.
_PARTS = (
    ("runtime", GREY, ("runtime",)),
    ("layer weights", BLUE, ("layer_weights", "buffers")),
    ("adapters and head", "#56B4E9", ("adapters", "head")),
    ("gradients and optimizer", "#CC79A7", ("gradients", "optimizer")),
    ("saved activations", GREEN, ("cache_pages", "saved_activations")),
    ("transients", ORANGE, ("transients",)),
    ("layers below the window", "#D55E00", (PREFIX,)),
)


def png(forecast: Forecast) -> bytes:
    """A forecast drawn as a PNG image."""
    figure, axes = new_figure(f"{forecast.joins} of {forecast.clients} clients can join {short(forecast.job)}")
    classes = forecast.classes
    needed = [max(row.planned_bytes, row.budget_bytes + row.shortfall_bytes) for row in classes if row.excluded]
    top = _ROOM * max([row.planned_bytes for row in classes] + needed) / _MIB
    crowded = len(classes) > MANY // 2
    for place, row in enumerate(classes):
        _draw(axes, place, row, top)
        if not crowded:
            _label(axes, place, row)
    names = [", ".join(_crowded_facts(row)) if crowded else "\n".join(_facts(row)) for row in classes]
    axes.set_xticks(range(len(names)), names, rotation=45 if crowded else 0, ha="right" if crowded else "center")
    axes.set(xlim=(-0.6, max(len(names), 2) - 0.4), ylim=(0, top), ylabel="MiB above the idle process")
    handles = [Patch(color=colour, label=label) for label, colour, parts in reversed(_PARTS) if _any(forecast, parts)]
    axes.figure.legend(
        handles=[*handles, Patch(color=_BUDGET, label="budget")], frameon=False, loc="outside right upper", fontsize=9
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _facts(row: ClassForecast) -> list[str]:
    return [short(row.name), f"{row.joins} of {row.clients}", format_bytes(row.budget_bytes)]


def _crowded_facts(row: ClassForecast) -> list[str]:
    """The name of a class with many neighbours: its bars have no labels, so the name tells of joining and shortfall."""
    shortfall = [f"lacks {format_bytes(row.shortfall_bytes)}"] if row.excluded else []
    return (
        [short(row.name), *shortfall]
        if not row.joins
        else [short(row.name), f"{row.joins} of {row.clients}", *shortfall]
    )


def _any(forecast: Forecast, names: tuple[str, ...]) -> bool:
    return any(row.parts[name] for row in forecast.classes for name in names)


def _draw(axes: Axes, place: int, row: ClassForecast, top: float) -> None:
    """Draw a class: its budget on the left, its plan on the right. The plan is pale if no client of the class joins."""
    left, right, budget = place - _ASIDE, place + _ASIDE, row.budget_bytes / _MIB
    axes.bar(left, min(budget, top), width=_BAR, color=_BUDGET)
    if budget > top:
        axes.annotate("↑", (left, top), (0, -14), textcoords="offset points", ha="center")
    bottom = 0.0
    for _, colour, parts in _PARTS:
        height = sum(row.parts[part] for part in parts) / _MIB
        axes.bar(right, height, bottom=bottom, width=_BAR, color=colour, alpha=1.0 if row.joins else 0.45)
        bottom += height
    if row.excluded:
        axes.plot([left - _BAR / 2, right + _BAR / 2], [budget, budget], color="black", linestyle="--", linewidth=1)


def _label(axes: Axes, place: int, row: ClassForecast) -> None:
    """Write the planned bytes above a class's plan, and above that the shortfall."""
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
    planned = row.planned_bytes / _MIB
    if row.joins:
        axes.annotate(format_bytes(row.planned_bytes), (place + _ASIDE, planned), (0, 3), **style)
    if row.excluded:
        who, shortfall = f"{row.excluded} lack" if row.joins else "lacks", format_bytes(row.shortfall_bytes)
        top = max((row.budget_bytes + row.shortfall_bytes) / _MIB, planned)
        axes.annotate(f"{who} {shortfall}", (place, top), (0, 16 if row.joins else 4), fontweight="bold", **style)
