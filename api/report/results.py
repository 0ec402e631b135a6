"""Shows the result of a finished job as tables."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from chainfed_ray.api.report.fleet import FleetClass, by_class, in_words, short
from chainfed_ray.api.report.progress import price
from chainfed_ray.api.report.scores import is_causal, short_score
from chainfed_ray.records.result import StageMemory
from chainfed_ray.records.rounds import HeadFit, JobFinished, JobStarted, Round
from chainfed_ray.spec.fleet import PartitionSpec
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.sections import ChainSpec, ModelSpec
from chainfed_ray.units import format_bytes, format_seconds

_MIB = 2**20
_CLASSES_ACROSS = 4  # how many classes the table of memory has room for


def results(
    spec: JobSpec, job_started: JobStarted, rounds: Sequence[Round], job_finished: JobFinished
) -> RenderableType:
    """The scores, in all and stage by stage, and the memory and traffic of each class of clients."""
    classes = by_class(job_started, rounds)
    parts: list[RenderableType] = [
        _summary(spec, job_started, rounds, job_finished),
        "",
        _stages(spec.model, spec.chain, rounds),
        "",
        _fleet(classes),
        "",
        _turns(classes, rounds),
    ]
    memory = StageMemory.of(rounds)
    several = len({part.stage for part in memory}) > 1
    return Group(*parts, *(("", _memory(memory)) if several else ()))


def _summary(spec: JobSpec, job_started: JobStarted, rounds: Sequence[Round], job_finished: JobFinished) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row(*_score(spec.model, job_finished))
    form = "" if spec.model.quantization == "none" else f", matrices in {spec.model.quantization.upper()}"
    table.add_row("base model", f"{spec.model.base}, {job_started.layers} layers, frozen{form}")
    table.add_row("chain", f"layers {job_started.start_layer}–{job_started.layers - 1}, {job_started.window} at a time")
    took = format_seconds(sum(record.seconds for record in rounds))
    table.add_row("rounds", f"{len(rounds)} in {took}, {spec.rounds.clients} clients in each")
    if job_started.exits:
        table.add_row("start", f"found by {_sums(job_started.exits)}")
    if fits := [record.head_fit for record in rounds if record.head_fit and record.head_fit.accuracy is not None]:
        table.add_row("head", f"fitted to {_sums(fits)}")
    table.add_row("partition", f"{_scheme(spec.fleet.partition)}; sha256 {job_started.partition_hash[:12]}…")
    if job_finished.best:
        table.add_row("best stack", f"after round {job_finished.best.round + 1}: {job_finished.best.why}")
        same = job_finished.best.round == len(rounds) - 1
        table.add_row("model", f"uses the {job_finished.served} stack" + (", which is the best one" if same else ""))
    if job_finished.stopped:
        table.add_row("stopped", job_finished.stopped)
    if job_finished.epsilon is not None:
        table.add_row("privacy", f"{price(spec.privacy, job_finished.epsilon)}, client-level")
    return table


def _sums(fits: Sequence[HeadFit]) -> str:
    """Describe from whose sums heads were fitted in closed form."""
    sent, clients = format_bytes(sum(fit.sent_bytes for fit in fits)), max(fit.clients for fit in fits)
    return f"sums of {clients} clients, who sent {sent} for it"


def _score(model: ModelSpec, job_finished: JobFinished) -> tuple[str, Text]:
    score = (short_score(model, job_finished.loss, job_finished.accuracy), "bold")
    if is_causal(model):
        return "test perplexity", Text.assemble(score, f" ({job_finished.accuracy:.1%} of the tokens right)")
    f1 = job_finished.evaluation.macro_f1 if job_finished.evaluation else None
    loss = "not finite" if job_finished.loss is None else f"{job_finished.loss:.3f}"
    others = f" (loss {loss}" + ("" if f1 is None else f", macro-F1 {f1:.3f}") + ")"
    return "test accuracy", Text.assemble(score, others)


def _scheme(partition: PartitionSpec) -> str:
    if partition.scheme == "iid":
        return "iid"
    option = f"alpha {partition.alpha:g}" if partition.column is None else partition.column
    return f"{partition.scheme}, {option}"


def _stages(model: ModelSpec, chain: ChainSpec, rounds: Sequence[Round]) -> Table:
    """The held-out scores at the end of each stage: of the early exit, and of the whole model."""
    table = Table(box=None, header_style="bold", pad_edge=False, caption_justify="left", caption_style="dim")
    score = "perplexity" if is_causal(model) else "accuracy"
    exit_words = "the model's end" if chain.look_ahead == "exact" else "cut at the window's top (early exit)"
    table.caption = f"held-out {score}: {exit_words}, and whole model"
    for name in ("stage", "layers", "rounds", "cut", "whole"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why it ended", overflow="fold")
    for record in rounds:
        if record.ended:
            count = sum(other.stage == record.stage for other in rounds)
            cut, evaluation = short_score(model, record.kept_loss, record.kept_accuracy), record.evaluation
            whole = short_score(model, evaluation.loss, evaluation.accuracy) if evaluation else "–"
            layers = f"{record.bottom}–{record.top}"
            table.add_row(str(record.stage + 1), layers, str(count), cut, whole, record.ended + _restored(record))
    return table


def _restored(record: Round) -> str:
    if (back := record.restored) is None:
        return ""
    return "; back to " + ("its beginning" if back.round is None else f"round {back.round + 1}")


def _fleet(classes: Sequence[FleetClass]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("class", overflow="fold")
    for name in ("clients", "budget", "planned", "peak", "turns", "retried", "failed", "sent"):
        table.add_column(name, justify="right", no_wrap=True)
    for fleet in classes:
        if fleet.clients:
            peak = "–" if fleet.peak is None else format_bytes(fleet.peak)
            planned, sent = format_bytes(fleet.planned), format_bytes(fleet.sent)
            cells = [planned, peak, str(fleet.turns), str(fleet.retried), str(fleet.failed_turns), sent]
        else:
            cells = [f"lacks {format_bytes(fleet.shortfall)}", "", "", "", "", ""]
        clients = f"{fleet.clients}" + (f" (+{fleet.excluded} out)" if fleet.clients and fleet.excluded else "")
        table.add_row(
            fleet.name, clients if fleet.clients else f"{fleet.excluded} out", format_bytes(fleet.budget), *cells
        )
    return table


def _turns(classes: Sequence[FleetClass], rounds: Sequence[Round]) -> RenderableType:
    """The settings of the turns, with one line for classes that are alike; then the clients that exceeded a plan."""
    table = Table.grid(padding=(0, 2))
    alike: dict[str, list[str]] = {}
    for fleet in classes:
        if fleet.turns:
            alike.setdefault(in_words(fleet.settings), []).append(short(fleet.name))
    for settings, names in alike.items():
        table.add_row(", ".join(names), settings)
    for record in rounds:
        for turn in record.turns:
            if turn.exceeded:
                table.add_row(short(turn.client), f"exceeded its plan in round {record.index + 1}, and ran again")
        for failed in record.failed_turns:
            if failed.over_budget:
                table.add_row(short(failed.client), f"exceeded every plan in round {record.index + 1}: excluded since")
    return table


def _memory(memory: Sequence[StageMemory]) -> Table:
    """The measured peak and the plan of each class in each stage. If there are many classes, only the smallest are shown."""
    names = list(dict.fromkeys(part.client_class for part in sorted(memory, key=lambda part: part.budget_bytes)))
    shown, more = names[:_CLASSES_ACROSS], len(names[_CLASSES_ACROSS:])
    table = Table(box=None, header_style="bold", pad_edge=False, caption_justify="left", caption_style="dim")
    table.caption = "MiB: measured peak / planned" + (
        f"; {more} larger classes are in the JSON result only" if more else ""
    )
    for name in ("stage", "layers", *map(short, shown)):
        table.add_column(name, justify="right", no_wrap=True)
    cells = {(part.stage, part.client_class): _peak_and_plan(part) for part in memory}
    for stage, bottom, top in sorted({(part.stage, part.bottom, part.top) for part in memory}):
        table.add_row(str(stage + 1), f"{bottom}–{top}", *(cells.get((stage, name), "–") for name in shown))
    return table


def _peak_and_plan(part: StageMemory) -> str:
    peak = "–" if part.peak_bytes is None else f"{part.peak_bytes / _MIB:.1f}"
    return f"{peak} / {part.planned_bytes / _MIB:.1f}"
