"""Shows a running job to a person: a live panel on a terminal; elsewhere a line for each round and each long activity."""

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
from chainfed_ray.api.report.fleet import TurnSettings, by_class, in_words, span
from chainfed_ray.api.report.scores import evaluation_line, is_causal, short_score
from chainfed_ray.records.fleet import AdmittedClients
from chainfed_ray.records.rounds import FailedTurn, JobFinished, JobStarted, Round, complete_fits
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.sections import ModelSpec, PrivacySpec
from chainfed_ray.units import format_bytes, format_seconds

_RECENT = 5  # how many rounds the estimate of the remaining time is based on
_REASONS = 3  # how many failed turns of a round are shown with their reasons


def time_left(rounds: Sequence[Round], total: int) -> float | None:
    """The seconds until the last possible round, at the pace of the last few; None before the first round.

    It is an upper bound at that pace: a stage may converge before its limit of rounds.
    """
    if not rounds:
        return None
    return fmean(record.seconds for record in rounds[-_RECENT:]) * (total - len(rounds))


def price(privacy: PrivacySpec | None, epsilon: float) -> str:
    """The privacy that a job has spent: ``ε 1.00 at δ 1e-5``. The job must have a section ``privacy``."""
    assert privacy, "only a job with privacy has an ε"
    return f"ε {epsilon:.2f} at δ {privacy.delta:g}".replace("e-0", "e-")


class ProgressDisplay:
    """Shows the job ``name`` while its block runs; give it every record as it comes.

    A record ends the activity before it. ``check`` is called at every activity; it may raise to stop the work.
    """

    def __init__(self, console: Console, name: str, spec: JobSpec, check: Callable[[], None] = lambda: None) -> None:
        self._console, self._name, self._spec, self._check = console, name, spec, check
        self._started: JobStarted | None = None
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
        """Print a sentence above the panel."""
        self._console.print(words)

    def idle(self) -> None:
        """The activity is over, and no other has begun."""
        self._display.end()

    def job_started(self, job_started: JobStarted) -> None:
        """Show which clients take part, and where the chain starts."""
        self._display.end()
        self._started = job_started
        self.say(f"{job_started.taking_part} clients take part, {job_started.left_out} are excluded.")
        for fleet in by_class(job_started, ()):
            if fleet.shortfall:
                self.say(
                    f"  {fleet.name} ({fleet.excluded}): {format_bytes(fleet.budget)} a client, "
                    f"{format_bytes(fleet.shortfall)} too little for any window"
                )
        for group in job_started.excluded:
            if not group.shortfall_bytes:  # a site that is not there, or refuses
                self.say(f"  {group.client_class}: {group.reason}")
        self._say_reduced(job_started)
        if job_started.cka:
            self.say("Similarity of each layer's output to the embeddings (CKA), averaged over the clients:")
            self.say("  " + "  ".join(f"{layer}: {value:.2f}" for layer, value in enumerate(job_started.cka)))
            self._say_why(job_started.failed_turns)
            self.say(f"The chain starts at layer {job_started.start_layer}, {self._why_there(job_started)}.")
        elif job_started.exits:
            self.say("Held-out loss of a head fitted to the output of each window's top layer, before training:")
            self.say("  " + "  ".join(_exits(job_started)))
            self._say_why(job_started.failed_turns)
            self.say(f"The chain starts at layer {job_started.start_layer}, where that loss is least.")
        else:
            given = isinstance(self._spec.chain.start, int) or self._spec.chain.start == "last"
            why = "as the job asks" if given else "with its only window"
            self.say(f"The chain starts at layer {job_started.start_layer}, {why}.")
        if job_started.window < (wanted := self._spec.window(job_started.layers)):
            self.say(f"The job asks for windows of {wanted} layers, but no client's budget holds one.")
        self.say(
            f"Its windows of {_counted(job_started.window, 'layer')} go up to layer {job_started.layers - 1}: "
            f"{_counted(job_started.stages, 'stage')}, {_counted(job_started.total_rounds, 'round')} at most."
        )
        if job_started.evaluator != self._spec.evaluation.engine:
            self.say(f"The whole model is evaluated by {job_started.evaluator}.")
        self._draw()

    def _why_there(self, job_started: JobStarted) -> str:
        threshold = self._spec.chain.cka_threshold
        if job_started.cka[job_started.start_layer] < threshold:
            return f"the first below {threshold:g}"
        return f"the last window's: no layer before it is below {threshold:g}"

    def _say_reduced(self, job_started: JobStarted) -> None:
        """Name the clients whose memory or disk only fits a reduced plan.

        The full plan has the whole window, whole batches, resident weights and a prefix cache.
        """
        reduced: dict[str, list[AdmittedClients]] = {}
        for client in job_started.admitted:
            full = TurnSettings(job_started.window, client.batch, "resident", False, False, None)
            if TurnSettings.planned(client) != full or not client.cached:
                reduced.setdefault(client.client_class, []).append(client)
        for name, clients in reduced.items():
            words = in_words({TurnSettings.planned(client) for client in clients})
            recomputed = ", without a prefix cache" if not all(client.cached for client in clients) else ""
            self.say(f"  {name} ({sum(client.clients for client in clients)}): {words}{recomputed}")

    def round(self, record: Round, resumed: bool = False) -> None:
        """Show a finished round; ``resumed`` if it was finished before this process started."""
        self._display.end()
        self._rounds.append(record)
        for site in record.late:
            joined = sum(group.clients for group in site.admitted)
            takes = "takes" if joined == 1 else "take"
            self.say(
                f"Site {site.site} came: {_counted(joined, 'client')} of {site.client_class} {takes} part from now on."
                if joined
                else f"Site {site.site} came, and takes no part."
            )
            for group in site.excluded:
                self.say(f"  {site.client_class} ({_counted(group.clients, 'client')} left out): {group.reason}")
        if fit := record.head_fit:
            self.say(f"The head is fitted to {fit.examples} examples of {fit.clients} clients.")
            self._say_why(fit.failed_turns)
        if not self._display.is_live:
            self.say(self._line(record, resumed))
        for turn in record.turns:
            if turn.exceeded:
                settings = in_words({TurnSettings.used(record, turn)})
                self.say(f"  {turn.client} ran its turn again, {settings}: {turn.exceeded}")
        self._say_why(record.failed_turns)
        if not record.counted:
            self.say("  The round does not count: too few updates for the quorum.")
        if record.evaluation:
            self.say(evaluation_line(self._spec.model, record.evaluation))
        if record.ended:
            self.say(f"Stage {record.stage + 1} (layers {record.bottom}–{record.top}) ends: {record.ended}.")
        if back := record.restored:
            what = "what it began with" if back.round is None else f"its stack after round {back.round + 1}"
            score = _scored(self._spec.model, back.loss, back.accuracy)
            self.say(f"  It goes back to {what}, which has a lower held-out loss: {score}.")
        self._draw()

    def _say_why(self, failed: Sequence[FailedTurn]) -> None:
        for turn in failed[:_REASONS]:
            self.say(f"  {turn.client}: {turn.reason}" + ("; it is excluded from now on" if turn.over_budget else ""))
        if len(failed) > _REASONS:
            self.say(f"  and {len(failed) - _REASONS} more turns failed")

    def job_finished(self, job_finished: JobFinished) -> None:
        """Show the result of the job."""
        self._display.end()
        if job_finished.stopped:
            self.say(f"No more rounds ({job_finished.stopped}).")
        score = short_score(self._spec.model, job_finished.loss, job_finished.accuracy)
        if is_causal(self._spec.model):
            self.say(f"Done: the perplexity of the whole chain on the test rows is {score}.")
        else:
            self.say(f"Done: {score} of the test rows are classified right by the whole chain.")
        if job_finished.epsilon is not None:
            self.say(f"Its client-level privacy: {price(self._spec.privacy, job_finished.epsilon)}.")

    def _line(self, record: Round, resumed: bool) -> str:
        assert self._started is not None
        failed = f", {len(record.failed_turns)} failed" if record.failed_turns else ""
        clients = f"{len(record.turns)} clients{failed}"
        score = _scored(self._spec.model, record.held_out_loss, record.accuracy)
        accuracy = "" if record.accuracy is None else f"  {score}"
        peaks = [turn.peak_bytes for turn in record.turns if turn.peak_bytes is not None]
        peak = f"  peak {format_bytes(max(peaks))}" if peaks else ""
        left = time_left(self._rounds, self._started.total_rounds) or 0.0
        when = "resumed" if resumed else f"≤ {format_seconds(left)} left"
        place = f"round {record.index + 1}/{self._started.total_rounds}"
        spent = "" if record.epsilon is None else f"  {price(self._spec.privacy, record.epsilon)}"
        return f"{place:<12}  layers {record.bottom}–{record.top}  {clients}{accuracy}{spent}{peak}  {when}"

    def drawn(self) -> RenderableType:
        """What a terminal shows now: the current activity, and the panel below it."""
        return self._display.drawn()

    def _draw(self) -> None:
        if self._display.is_live:
            self._display.show(self.panel())

    def panel(self) -> RenderableType:
        """The job's state as a panel, for a terminal of 80 columns or more."""
        job_started = self._started
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
        facts.add_row("held out", _held_out(self._spec.model, self._rounds))
        if newest and newest.epsilon is not None:
            facts.add_row("privacy", price(self._spec.privacy, newest.epsilon))
        facts.add_row("memory", _memory(job_started, self._rounds))
        return Panel(Group(facts, ProgressBar(total=total, completed=done)), title=self._name, title_align="left")


def _exits(job_started: JobStarted) -> list[str]:
    """The layers of each window, with the held-out loss of the early exit at its top."""
    exits = []
    for bottom, (fit, counts) in enumerate(zip(job_started.exits, complete_fits(job_started.exits), strict=True)):
        loss = "none" if fit.held_out_loss is None else f"{fit.held_out_loss:.3f}"
        incomplete = "" if counts else " (without some clients)"
        exits.append(f"{span((bottom, bottom + job_started.window - 1))}: {loss}{incomplete}")
    return exits


def _scored(model: ModelSpec, loss: float | None, accuracy: float | None) -> str:
    score = short_score(model, loss, accuracy)
    return f"perplexity {score}" if is_causal(model) else f"{score} right"


def _chain(job_started: JobStarted, newest: Round | None) -> Text:
    """A cell for each layer, styled by whether it has no adapter, is finished, is in the window, or is still to come."""
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
        retried = sum(turn.exceeded is not None for turn in rounds[-1].turns)
        done = f"{len(rounds[-1].turns)} done" + (f" ({retried} retried)" if retried else "")
        last = f"{done}, {len(rounds[-1].failed_turns)} failed in the last round; "
    exceeded = sum(failed.over_budget for record in rounds for failed in record.failed_turns)
    excluded = f"{job_started.left_out} excluded" + (f", {exceeded} over budget" if exceeded else "")
    return f"{last}{job_started.taking_part - exceeded} take part, {excluded}"


def _held_out(model: ModelSpec, rounds: Sequence[Round]) -> str:
    known = [record for record in rounds if record.accuracy is not None]
    if not known:
        return "not measured yet"
    newest = short_score(model, known[-1].held_out_loss, known[-1].accuracy)
    if is_causal(model):
        least = min((record.held_out_loss for record in known if record.held_out_loss is not None), default=None)
        return f"perplexity {newest} on the validation rows (best {short_score(model, least, 0)})"
    return f"{newest} of the validation rows (best {max(record.accuracy or 0 for record in known):.1%})"


def _memory(job_started: JobStarted, rounds: Sequence[Round]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("class", "budget", "planned", "measured peak", "window", "examples"):
        table.add_column(name, justify="left" if name == "class" else "right", overflow="fold")
    for fleet in by_class(job_started, rounds):
        if fleet.clients:
            peak = "–" if fleet.peak is None else format_bytes(fleet.peak)
            window = span(one.window for one in fleet.settings)
            examples = span(one.micro_batch for one in fleet.settings)
            table.add_row(fleet.name, format_bytes(fleet.budget), format_bytes(fleet.planned), peak, window, examples)
    return table


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
