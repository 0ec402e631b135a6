"""A finished job as a table."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from api.fleet import by_class
from chainfed_ray.config import JobSpec
from chainfed_ray.quantities import format_bytes, format_seconds
from chainfed_ray.records import Ending, Opening, Round


def results(spec: JobSpec, opening: Opening, rounds: Sequence[Round], ending: Ending) -> RenderableType:
    """What came out: the accuracy, stage by stage, and what it took, class by class."""
    return Group(_summary(spec, opening, rounds, ending), "", _stages(rounds), "", _fleet(opening, rounds))


def _summary(spec: JobSpec, opening: Opening, rounds: Sequence[Round], ending: Ending) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("test accuracy", f"[bold]{ending.accuracy:.1%}[/bold] (loss {ending.loss:.3f})")
    table.add_row("base model", f"{spec.model.base}, {opening.layers} layers, frozen")
    table.add_row("chain", f"layers {opening.start_layer}–{opening.layers - 1}, {spec.chain.window} at a time")
    took = format_seconds(sum(record.seconds for record in rounds))
    table.add_row("rounds", f"{len(rounds)} in {took}, {spec.rounds.clients} clients in each")
    return table


def _stages(rounds: Sequence[Round]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("stage", "layers", "rounds", "accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why it ended", overflow="fold")
    for record in rounds:
        if record.ended:
            count = sum(other.stage == record.stage for other in rounds)
            accuracy = "–" if record.accuracy is None else f"{record.accuracy:.1%}"
            layers = f"{record.bottom}–{record.top}"
            table.add_row(str(record.stage + 1), layers, str(count), accuracy, record.ended)
    return table


def _fleet(opening: Opening, rounds: Sequence[Round]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("class", overflow="fold")
    for name in ("clients", "budget", "planned", "peak", "turns", "lost", "sent"):
        table.add_column(name, justify="right", no_wrap=True)
    for fleet in by_class(opening, rounds):
        if fleet.clients:
            peak = "–" if fleet.peak is None else format_bytes(fleet.peak)
            planned, sent = format_bytes(fleet.planned), format_bytes(fleet.sent)
            cells = [planned, peak, str(fleet.turns), str(fleet.lost), sent]
        else:
            cells = [f"lacks {format_bytes(fleet.lacking)}", "", "", "", ""]
        clients = f"{fleet.clients}" + (f" (+{fleet.left_out} left out)" if fleet.clients and fleet.left_out else "")
        table.add_row(
            fleet.name, clients if fleet.clients else f"{fleet.left_out} out", format_bytes(fleet.budget), *cells
        )
    return table
