"""A job while it runs, as a person sees it: a live panel on a terminal, a line for each round and long activity elsewhere."""

from collections.abc import Callable, Sequence
from statistics import fmean
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from chainfed_ray.activity import Activity
from chainfed_ray.api.report.activity_display import ActivityDisplay
from chainfed_ray.api.report.fleet import Way, by_class, in_words, span
from chainfed_ray.api.report.scores import evaluation_line, is_causal, short_score
from chainfed_ray.records.rounds import AdmittedClient, FailedTurn, JobFinished, JobStarted, Round, complete_fits
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.units import format_bytes, format_seconds

_RECENT = 5
_REASONS = 3


def time_left(rounds: Sequence[Round], total: int) -> float | None:
    """The seconds that the rounds still possible take at the pace of the last few; stages may end before their limit."""
    if not rounds:
        return None
    return fmean(record.seconds for record in rounds[-_RECENT:]) * (total - len(rounds))


def price(spec: JobSpec, epsilon: float) -> str:
    """What the privacy of a job comes to, in words."""
    assert spec.privacy, "without it there is no ε"
    return f"ε {epsilon:.2f} at δ {spec.privacy.delta:g}".replace("e-0", "e-")


class ProgressDisplay:
    """Shows the job ``name``; give it every record as it comes. A context manager: the live panel lasts as long.

    A record ends what went on before it. ``check`` is called whenever something is told: it may raise, to end the work.
    """

    def __init__(self, console: Console, name: str, spec: JobSpec, check: Callable[[], None] = lambda: None) -> None:
        self._console, self._name, self._spec, self._check = console, name, spec, check
        self._opening: JobStarted | None = None
        self._rounds: list[Round] = []
        self._display = ActivityDisplay(console)

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, trace)

    def listen(self, activity: Activity) -> None:
        """See ``Listener``."""
        self._check()
        self._display(activity)

    def say(self, words: str) -> None:
        """A sentence above the panel."""
        self._console.print(words)

    def idle(self) -> None:
        """What went on is over."""
        self._display.end()

    def job_started(self, job_started: JobStarted) -> None:
        """Who takes part, and where the chain starts."""
        self._display.end()
        self._opening = job_started
        self.say(f"{len(job_started.admitted)} clients take part, {len(job_started.excluded)} are left out.")
        for fleet in by_class(job_started, ()):
            if fleet.excluded:
                self.say(
                    f"  {fleet.name} ({fleet.excluded}): {format_bytes(fleet.budget)} a client, "
                    f"{format_bytes(fleet.shortfall)} too little for any window"
                )
        self._say_leaner(job_started)
        if job_started.cka:
            self.say(
                "How like the embeddings each layer's output is (CKA; 1 is the same), on average over the clients:"
            )
            self.say("  " + "  ".join(f"{layer}: {value:.2f}" for layer, value in enumerate(job_started.cka)))
            self._say_why(job_started.failed_turns)
            self.say(f"The chain starts at layer {job_started.start_layer}, {self._why_there(job_started)}.")
        elif job_started.exits:
            self.say("Held-out loss of a head fitted to the output of each window's top layer, before training:")
            self.say("  " + "  ".join(_exits(job_started)))
            self._say_why(job_started.failed_turns)
            self.say(f"The chain starts at layer {job_started.start_layer}, where that is least.")
        else:
            asked_for = isinstance(self._spec.chain.start, int)
            why = "as the job asks" if asked_for else "with its only window"
            self.say(f"The chain starts at layer {job_started.start_layer}, {why}.")
        if job_started.window < (asked := self._spec.chain.window):
            self.say(f"No client's budget holds windows of {asked} layers, as the job asks.")
        self.say(
            f"Its windows of {job_started.window} layer{'s' if job_started.window > 1 else ''} go up to layer "
            f"{job_started.layers - 1}: {job_started.stages} stages, {job_started.total_rounds} rounds at most."
        )
        if job_started.evaluator != self._spec.evaluation.engine:
            self.say(f"The whole model is judged by {job_started.evaluator}.")
        self._draw()

    def _why_there(self, job_started: JobStarted) -> str:
        threshold = self._spec.chain.cka_threshold
        if job_started.cka[job_started.start_layer] < threshold:
            return f"the first below {threshold:g}"
        return f"that of the last window: none before is below {threshold:g}"

    def _say_leaner(self, job_started: JobStarted) -> None:
        """Which clients do not train the whole window at once, with whole layers and batches, because it would not fit."""
        leaner: dict[str, list[AdmittedClient]] = {}
        for client in job_started.admitted:
            whole = min(self._spec.rounds.batch_size, client.examples)
            if Way.planned(client) != (job_started.window, whole, "resident", False) or not client.cached:
                leaner.setdefault(client.client_class, []).append(client)
        for name, clients in leaner.items():
            words = in_words({Way.planned(client) for client in clients})
            recomputed = ", without a prefix cache" if not all(client.cached for client in clients) else ""
            self.say(f"  {name} ({len(clients)}): {words}{recomputed}")

    def round(self, record: Round, resumed: bool = False) -> None:
        """A round is over; ``resumed`` if it was over before this process began."""
        self._display.end()
        self._rounds.append(record)
        if fit := record.head_fit:
            self.say(f"The head is fitted to {fit.examples} examples of {fit.clients} clients.")
            self._say_why(fit.failed_turns)
        if not self._display.is_live:
            self.say(self._line(record, resumed))
        for turn in record.turns:
            if turn.exceeded:
                self.say(f"  {turn.client} took its turn again, {in_words({Way.taken(record, turn)})}: {turn.exceeded}")
        self._say_why(record.failed_turns)
        if not record.counted:
            self.say("  too few updates for the quorum: the round does not count")
        if record.evaluation:
            self.say(evaluation_line(self._spec, record.evaluation))
        if record.ended:
            self.say(f"Stage {record.stage + 1} (layers {record.bottom}–{record.top}) ends: {record.ended}.")
        if back := record.restored:
            what = "what it began with" if back.round is None else f"its stack after round {back.round + 1}"
            score = _scored(self._spec, back.loss, back.accuracy)
            self.say(f"  It goes back to {what}, where held-out rows had less loss: {score}.")
        self._draw()

    def _say_why(self, lost: Sequence[FailedTurn]) -> None:
        for turn in lost[:_REASONS]:
            self.say(f"  {turn.client}: {turn.reason}" + ("; it is left out from now on" if turn.over_budget else ""))
        if len(lost) > _REASONS:
            self.say(f"  and {len(lost) - _REASONS} more turns were lost")

    def job_finished(self, job_finished: JobFinished) -> None:
        """The job is over."""
        self._display.end()
        if job_finished.stopped:
            self.say(f"No more rounds ({job_finished.stopped}).")
        score = short_score(self._spec, job_finished.loss, job_finished.accuracy)
        if is_causal(self._spec):
            self.say(f"Done: the perplexity of the whole chain on the test rows is {score}.")
        else:
            self.say(f"Done: {score} of the test rows are classified right by the whole chain.")
        if job_finished.epsilon is not None:
            self.say(f"Its privacy: {price(self._spec, job_finished.epsilon)}, client by client.")

    def _line(self, record: Round, resumed: bool) -> str:
        assert self._opening is not None
        clients = f"{len(record.turns)} clients" + (f", {len(record.failed_turns)} lost" if record.failed_turns else "")
        score = _scored(self._spec, record.held_out_loss, record.accuracy)
        accuracy = "" if record.accuracy is None else f"  {score}"
        peaks = [turn.peak_bytes for turn in record.turns if turn.peak_bytes is not None]
        peak = f"  peak {format_bytes(max(peaks))}" if peaks else ""
        left = time_left(self._rounds, self._opening.total_rounds) or 0.0
        when = "resumed" if resumed else f"≤ {format_seconds(left)} left"
        place = f"round {record.index + 1}/{self._opening.total_rounds}"
        spent = "" if record.epsilon is None else f"  {price(self._spec, record.epsilon)}"
        return f"{place:<12}  layers {record.bottom}–{record.top}  {clients}{accuracy}{spent}{peak}  {when}"

    def drawn(self) -> RenderableType:
        """What a terminal shows now: what goes on, above the panel."""
        return self._display.drawn()

    def _draw(self) -> None:
        if self._display.is_live:
            self._display.show(self.panel())

    def panel(self) -> RenderableType:
        """The present state, for a terminal of 80 columns or more."""
        job_started = self._opening
        if job_started is None:
            return Text("")
        newest = self._rounds[-1] if self._rounds else None
        done, total = len(self._rounds), job_started.total_rounds
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(overflow="fold")
        facts.add_row("chain", _chain(job_started, newest))
        facts.add_row("stage", _stage(job_started, newest))
        left = time_left(self._rounds, total)
        facts.add_row(
            "round", f"{done} of {total}" + ("" if left is None else f", at most {format_seconds(left)} left")
        )
        facts.add_row("clients", _clients(job_started, self._rounds))
        facts.add_row("held out", _held_out(self._spec, self._rounds))
        if newest and newest.epsilon is not None:
            facts.add_row("privacy", price(self._spec, newest.epsilon))
        facts.add_row("memory", _memory(job_started, self._rounds))
        return Panel(Group(facts, ProgressBar(total=total, completed=done)), title=self._name, title_align="left")


def _exits(job_started: JobStarted) -> list[str]:
    told = []
    for bottom, (fit, counts) in enumerate(zip(job_started.exits, complete_fits(job_started.exits), strict=True)):
        loss = "none" if fit.held_out_loss is None else f"{fit.held_out_loss:.3f}"
        passed_over = "" if counts else " (without some clients)"
        told.append(f"{span((bottom, bottom + job_started.window - 1))}: {loss}{passed_over}")
    return told


def _scored(spec: JobSpec, loss: float | None, accuracy: float | None) -> str:
    score = short_score(spec, loss, accuracy)
    return f"perplexity {score}" if is_causal(spec) else f"{score} right"


def _chain(job_started: JobStarted, newest: Round | None) -> Text:
    """A cell for each layer: without an adapter, done, in the window, still to come."""
    bottom, top = (newest.bottom, newest.top) if newest else (job_started.start_layer, job_started.start_layer - 1)
    text = Text()
    for layer in range(job_started.layers):
        if layer < job_started.start_layer:
            text.append(f"{layer} ", style="dim")
        elif bottom <= layer <= top:
            text.append(f"[{layer}]", style="bold green")
        else:
            text.append(f" {layer} ", style="green" if layer < bottom else "")
    text.append("  [ ] in training", style="dim")
    return text


def _stage(job_started: JobStarted, newest: Round | None) -> str:
    if newest is None:
        return f"1 of {job_started.stages}, about to begin"
    return (
        f"{newest.stage + 1} of {job_started.stages}: layers {newest.bottom}–{newest.top} of 0–{job_started.layers - 1}"
    )


def _clients(job_started: JobStarted, rounds: Sequence[Round]) -> str:
    last = ""
    if rounds:
        again = sum(turn.exceeded is not None for turn in rounds[-1].turns)
        done = f"{len(rounds[-1].turns)} done" + (f" ({again} took it again)" if again else "")
        last = f"{done}, {len(rounds[-1].failed_turns)} lost in the last round; "
    exceeded = sum(lost.over_budget for record in rounds for lost in record.failed_turns)
    excluded = f"{len(job_started.excluded)} left out" + (f", {exceeded} over budget" if exceeded else "")
    return f"{last}{len(job_started.admitted) - exceeded} take part, {excluded}"


def _held_out(spec: JobSpec, rounds: Sequence[Round]) -> str:
    known = [record for record in rounds if record.accuracy is not None]
    if not known:
        return "not measured yet"
    newest = short_score(spec, known[-1].held_out_loss, known[-1].accuracy)
    if is_causal(spec):
        least = min((record.held_out_loss for record in known if record.held_out_loss is not None), default=None)
        return f"perplexity {newest} on the validation rows (best {short_score(spec, least, 0)})"
    return f"{newest} of the validation rows (best {max(record.accuracy or 0 for record in known):.1%})"


def _memory(job_started: JobStarted, rounds: Sequence[Round]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("class", "budget", "planned", "measured peak", "window", "examples"):
        table.add_column(name, justify="left" if name == "class" else "right", overflow="fold")
    for fleet in by_class(job_started, rounds):
        if fleet.clients:
            peak = "–" if fleet.peak is None else format_bytes(fleet.peak)
            window, examples = span(way.window for way in fleet.ways), span(way.micro_batch for way in fleet.ways)
            table.add_row(fleet.name, format_bytes(fleet.budget), format_bytes(fleet.planned), peak, window, examples)
    return table
