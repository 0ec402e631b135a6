"""Shows the forecast of a dry run as tables and sentences."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from chainfed_ray.api.report.fleet import short
from chainfed_ray.records.forecast import ClassForecast, Forecast
from chainfed_ray.units import format_bytes, format_seconds

_LOADED = {
    ("resident",): "whole layers in memory",
    ("streamed",): "weights streamed",
    ("resident", "streamed"): "whole layers in memory, or weights streamed",
}


def forecast_table(forecast: Forecast) -> RenderableType:
    """Which clients join and how they train, what others lack, bytes, time, and what one change would gain."""
    parts: list[RenderableType] = [_summary(forecast), "", _classes(forecast)]
    for lines in (list(_settings(forecast)), list(_excluded(forecast)), list(_changes(forecast))):
        parts += ["", *lines] if lines else []
    if forecast.look_aheads:
        parts += ["", "What each look-ahead would cost; * is the job's own:", _look_aheads(forecast)]
    return Group(*parts)


def _summary(forecast: Forecast) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    joins = (f"{forecast.joins} of {forecast.clients}", "bold")
    refused = ", and it is refused" if forecast.refused else ""
    table.add_row("job", Text.assemble(f"{forecast.job}: ", joins, f" clients can join{refused}"))
    table.add_row("base model", f"{forecast.base}, {forecast.layers} layers, frozen")
    if forecast.start == "last":
        chain = f"the last {forecast.window} layers together"
    else:
        start = f"layer {forecast.start} up" if isinstance(forecast.start, int) else "layer 0; the job finds its start"
        chain = f"{forecast.window} layers at a time, planned from {start}"
    table.add_row("chain", chain)
    table.add_row("rounds", f"{forecast.rounds} at most, {forecast.clients_per_round} clients in each")
    if forecast.stopped:
        table.add_row("", forecast.stopped)
    if forecast.estimated_seconds is not None:
        took = format_seconds(forecast.estimated_seconds)
        table.add_row("time", f"about {took} at most: an estimate, from steps timed on this machine")
    sent, received = format_bytes(forecast.sent_bytes_per_round), format_bytes(forecast.received_bytes)
    table.add_row("network", f"about {sent} sent in a round; each client receives {received}")
    if forecast.head_sums_bytes:
        sums = format_bytes(forecast.head_sums_bytes)
        table.add_row("", f"and sends at most {sums} of sums each time that a head is fitted")
    if forecast.exits_bytes:
        table.add_row("storage", f"{format_bytes(forecast.exits_bytes)} at most for early exits, beside the stacks")
    return table


def _classes(forecast: Forecast) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("class", no_wrap=True)
    for name in ("clients", "budget", "planned", "window", "batch", "step", "disk", "sent"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in forecast.classes:
        clients, budget = f"{row.joins} of {row.clients}", format_bytes(row.budget_bytes)
        if not row.joins:
            table.add_row(short(row.name), clients, budget, f"lacks {format_bytes(row.shortfall_bytes)}")
            continue
        step = "" if row.micro_step_seconds is None else _short_time(row.micro_step_seconds)
        planned, disk, sent = (format_bytes(count) for count in (row.planned_bytes, row.disk_bytes, row.sent_bytes))
        window, batch = _range(row.window), _range(row.micro_batch)
        table.add_row(short(row.name), clients, budget, planned, window, batch, step, disk, sent)
    return table


def _look_aheads(forecast: Forecast) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("look-ahead", no_wrap=True)
    for name in ("window", "clients", "whole", "passes", "time", "planned"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in forecast.look_aheads:
        window = "all" if row.window == forecast.layers else str(row.window)
        time = "" if row.estimated_seconds is None else format_seconds(row.estimated_seconds)
        bytes_of = sorted(row.planned_bytes.values())
        planned = "–".join(dict.fromkeys(map(format_bytes, bytes_of[:1] + bytes_of[-1:])))
        joins = f"{row.joins} of {forecast.clients}"
        name = f"{row.look_ahead} *" if row.own else row.look_ahead
        table.add_row(name, window, joins, str(row.whole), f"{row.layer_passes:.1f}", time, planned)
    return table


def _short_time(seconds: float) -> str:
    return (
        format_seconds(seconds) if seconds >= 10 else f"{seconds:.1f}s" if seconds >= 1 else f"{seconds * 1000:.0f}ms"
    )


def _range(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}–{ends[1]}"


def _settings(forecast: Forecast) -> Iterator[str]:
    """Sentences on how the classes train. Classes that train alike share one."""
    classes: dict[str, list[str]] = {}
    for row in forecast.classes:
        if row.joins:
            classes.setdefault(_described(row), []).append(short(row.name))
    yield from (f"{', '.join(names)}: {settings}." for settings, names in classes.items())


def _described(row: ClassForecast) -> str:
    """What clients of a class hold in memory, and what on disk. A number is given if only some of those that join do."""
    parts = [_LOADED[row.weights]]
    for words, count in (
        ("saved activations on disk", row.activations_offloaded),
        ("activations computed again in the backward pass", row.activations_recomputed),
        ("the prefix cached on disk", row.cached),
        ("the prefix run again in each step", row.joins - row.cached),
    ):
        if count:
            parts.append(words if count == row.joins else f"{words} ({count} of {row.joins})")
    return ", ".join(parts)


def _excluded(forecast: Forecast) -> Iterator[str | Text]:
    for row in forecast.classes:
        if row.excluded:
            who, shortfall = f"{row.excluded} of {row.clients}", format_bytes(row.shortfall_bytes)
            yield f"{short(row.name)}: {who} cannot hold any window; with {shortfall} more they would join."
    if forecast.refused:
        yield Text.assemble(("The job would be refused:", "bold"), f" {forecast.refused}")


def _changes(forecast: Forecast) -> Iterator[str]:
    if forecast.changes:
        yield "What one change would buy:"
        yield from (f"  {change.words}" for change in forecast.changes)
    if forecast.joins < forecast.clients and not any(change.joins_delta > 0 for change in forecast.changes):
        yield "Neither a smaller bottleneck, shorter texts, larger batches nor bfloat16 would let more clients join."
