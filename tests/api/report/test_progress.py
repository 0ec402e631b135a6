"""What a person sees while a job runs and when it is over."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.activity import Activity
from chainfed_ray.api.command.following import follow
from chainfed_ray.api.report.fleet import TurnSettings, by_class, in_words
from chainfed_ray.api.report.plots import draw
from chainfed_ray.api.report.progress import ProgressDisplay, time_left
from chainfed_ray.api.report.results import results
from chainfed_ray.api.schemas.jobs import JobProgress as Resource
from chainfed_ray.api.sdk.calls import Call
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.api.sdk.exchanges import Exchange
from chainfed_ray.errors import JobFailed, ServiceUnavailable
from chainfed_ray.records.fleet import ExcludedClients, LateSite
from chainfed_ray.records.result import JobResult, StageMemory
from chainfed_ray.records.rounds import (
    FailedTurn,
    HeadFit,
    JobStarted,
    Restored,
    Round,
    Turn,
)
from tests.builders import FINISHED, MIB, SPEC, a_console, a_round, a_start, clients_of, told

EXITS = tuple(
    HeadFit(
        clients=2, examples=rows, cpu_seconds=1.0, sent_bytes=1000, failed_turns=(), held_out_loss=loss, accuracy=0.5
    )
    for loss, rows in ((0.437, 200), (0.423, 200), (0.397, 200), (None, 200), (0.312, 150))
)


class Queue(Client):
    """A service with so many jobs before ``mine``, none of them over; None: it is away when it is asked."""

    def __init__(self, before: int | None, mine: str = "queued") -> None:
        super().__init__("http://127.0.0.1:1")
        self._before, self._mine = before, mine

    def stream_json(self, exchange: Exchange[Any]) -> Iterator[Any]:
        yield from ({"kind": kind, "data": {}} for kind in ("queued", "cancelled"))

    def json(self, call: Call[Any]) -> Any:
        if self._before is None:
            raise ServiceUnavailable("http://127.0.0.1:1", "no answer")
        states = ["cancelling", "running", *["queued"] * self._before][: self._before]
        jobs = [("over", "failed", "then"), *((f"job-{place}", state, None) for place, state in enumerate(states))]
        jobs += [("mine", self._mine, None), ("later", "queued", None)]
        return {"jobs": [{"id": job, "status": status, "finished_at": at} for job, status, at in reversed(jobs)]}


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (0, ""),
        (None, ""),
        (1, " Before it: job-0 (cancelling)."),
        (3, " Before it: job-0 (cancelling), job-1 (running), job-2 (queued)."),
        (5, " Before it: job-0 (cancelling), job-1 (running), job-2 (queued) and 2 more."),
    ],
)
def test_a_job_that_waits_names_those_before_it(before: int | None, words: str) -> None:
    console, client = a_console(), Queue(before)
    with pytest.raises(JobFailed, match="cancelled"):
        follow(client, "mine", SPEC, console)
    client.close()
    assert " ".join(console.export_text().split()) == "In the queue." + words


class Earlier(Client):
    """A service with a job that ended while its records were of version 1."""

    def stream_json(self, exchange: Exchange[Any]) -> Iterator[Any]:
        old = {"version": 1, "classes": ["a"], "admitted": [{"client": "phone-0"}]}
        for kind, data in (("running", {}), ("started", old), ("round", old), ("finished", old), ("succeeded", {})):
            yield {"kind": kind, "data": data}


def test_of_a_job_whose_records_are_of_an_earlier_version_the_states_are_shown() -> None:
    console, client = a_console(), Earlier("http://127.0.0.1:1")
    assert follow(client, "mine", SPEC, console) is None
    client.close()
    assert console.export_text().split("\n")[:2] == [
        "The job starts.",
        "Its records are of an earlier version: its rounds are not shown.",
    ]


@pytest.mark.parametrize(("job", "status"), [("mine", "running"), ("mine", "cancelled"), ("of long ago", "queued")])
def test_only_a_job_that_waits_has_any_before_it(job: str, status: str) -> None:
    console, client = a_console(), Queue(3, status)
    with pytest.raises(JobFailed, match="cancelled"):
        follow(client, job, SPEC, console)
    client.close()
    assert console.export_text().split() == ["In", "the", "queue."]


def test_a_site_that_is_not_there_and_comes_later_is_told_by_name() -> None:
    console, job_started = a_console(), a_start()
    away = ExcludedClients(
        client_class="clinic", clients=1, budget_bytes=MIB, shortfall_bytes=0, reason="site far takes no part yet"
    )
    late = LateSite(client_class="clinic", site="far", admitted=(job_started.admitted[0],))
    with ProgressDisplay(console, "tiny", SPEC) as progress:
        begun = job_started.model_copy(update={"excluded": (*job_started.excluded, away)})
        told(progress, begun, [a_round(0, begun), a_round(1, begun, late=(late,))])
    text = " ".join(console.export_text().split())
    assert "clinic: site far takes no part yet" in text
    assert "Site far came: 8 clients of clinic take part from now on." in text


def test_where_the_heads_read_best_the_chain_starts() -> None:
    job_started = a_start().model_copy(update={"cka": (), "exits": EXITS})
    console = a_console()
    with ProgressDisplay(console, "tiny", SPEC) as progress:
        told(progress, job_started, [])
    text = console.export_text()
    assert "Held-out loss of a head fitted to the output of each window's top layer" in text
    exits = "0–1: 0.437 1–2: 0.423 2–3: 0.397 3–4: none 4–5: 0.312 (without some clients)"
    assert exits in " ".join(text.split())
    assert "\nThe chain starts at layer 2, where that loss is least.\n" in text


@pytest.mark.parametrize(("asked", "why"), [(0, "as the job asks"), ("best-exit", "with its only window")])
def test_a_start_that_was_not_looked_for_has_its_reason(asked: int | str, why: str) -> None:
    job_started = a_start(start=0).model_copy(update={"cka": ()})
    spec = SPEC.model_copy(update={"chain": SPEC.chain.model_copy(update={"start": asked})})
    console = a_console()
    with ProgressDisplay(console, "tiny", spec) as progress:
        told(progress, job_started, [])
    assert f"\nThe chain starts at layer 0, {why}.\n" in console.export_text()


def test_a_line_for_each_round_where_there_is_no_terminal() -> None:
    job_started = a_start()
    lost = tuple(FailedTurn(client=f"phone-{i}", client_class="phone", reason=f"phone-{i} died") for i in range(5))
    fit = HeadFit(clients=12, examples=1200, cpu_seconds=1.0, sent_bytes=1000, failed_turns=())
    rounds = [
        a_round(0, job_started, head_fit=fit), a_round(1, job_started, failed_turns=lost),
        a_round(2, job_started, ended="round limit"),
    ]  # fmt: skip
    console = a_console()
    with ProgressDisplay(console, "tiny", SPEC) as progress:
        told(progress, job_started, rounds)
        progress.job_finished(FINISHED)
    text = console.export_text()
    assert "watch (2): 24MiB a client, 8MiB too little for any window" in text
    assert "The chain starts at layer 2, the last window's: no layer before it is below 0.5." in text
    assert "The head is fitted to 1200 examples of 12 clients." in text
    assert "round 1/20    layers 2–3  3 clients  50.0% right  peak 25MiB  ≤ 1m 16s left" in text
    assert "phone-2 died" in text
    assert "phone-3 died" not in text
    assert "and 2 more turns failed" in text
    assert "Stage 1 (layers 2–3) ends: round limit." in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("after", "what", "place"),
    [(None, "what it began with", "its beginning"), (1, "its stack after round 2", "round 2")],
)
def test_a_stage_that_goes_back_says_to_what(after: int | None, what: str, place: str) -> None:
    job_started, console = a_start(), a_console()
    rounds = [
        a_round(2, job_started, ended="round limit", restored=Restored(round=after, loss=0.5, accuracy=0.625)),
    ]
    with ProgressDisplay(console, "tiny", SPEC) as progress:
        told(progress, job_started, rounds)
    said = " ".join(console.export_text().split())
    assert f"It goes back to {what}, which has a lower held-out loss: 62.5% right." in said
    console.print(results(SPEC, job_started, rounds, FINISHED))
    row = next(line for line in console.export_text().splitlines() if line.endswith(f"round limit; back to {place}"))
    assert "62.5%" in row


def test_the_results_say_whose_sums_made_the_head() -> None:
    """If any did."""
    job_started, console = a_start(), a_console()
    fit = HeadFit(
        clients=11, examples=900, cpu_seconds=1.0, sent_bytes=3 * MIB, failed_turns=(), held_out_loss=0.7, accuracy=0.6
    )
    no_listener = fit.model_copy(update={"clients": 0, "sent_bytes": 0, "held_out_loss": None, "accuracy": None})
    told = list[str]()
    for head_fit in (fit, no_listener):
        console.print(results(SPEC, job_started, [a_round(0, job_started, head_fit=head_fit)], FINISHED))
        told.append(console.export_text())
    assert "fitted to sums of 11 clients, who sent 3MiB for it" in told[0]
    assert "fitted to" not in told[1]
    assert "found by" not in told[0] + told[1]
    console.print(results(SPEC, job_started.model_copy(update={"exits": EXITS}), [a_round(0, job_started)], FINISHED))
    assert "found by sums of 2 clients, who sent 4.9KiB for it" in console.export_text()


def test_the_panel_of_a_terminal() -> None:
    job_started = a_start()
    progress = ProgressDisplay(a_console(terminal=True), "tiny", SPEC)
    told(progress, job_started, [a_round(index, job_started) for index in range(3)])
    paper = a_console()
    paper.print(progress.panel())
    text = paper.export_text()
    for fact in ("1 of 3: layers 2–3 of 0–5", "3 of 20, at most 1m 08s left", "12 take part, 2 excluded", "52.0%"):
        assert fact in text
    for cells in ("0 1 [2][3] 4  5", "phone"):
        assert cells in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_terminal_shows_what_goes_on_in_one_line_above_the_panel() -> None:
    job_started, paper = a_start(), a_console()
    progress = ProgressDisplay(a_console(terminal=True), "tiny", SPEC)
    told(progress, job_started, [a_round(0, job_started)])
    for what in ("round 2 of 20: training", "a long story " * 20):
        progress.listen(Activity(what=what, done=2, total=4, unit="clients", seconds_left=7.9))
        paper.print(progress.drawn())
        line, title, *panel = paper.export_text().splitlines()
        assert line.lower().startswith(what[:60])
        assert title.startswith("╭─ tiny")
        assert all(len(shown) <= 80 for shown in (line, title, *panel))
        if "round" in what:
            assert line == "Round 2 of 20: training: 2 of 4 clients, 0s so far, about 8s left"
    progress.round(a_round(1, job_started))
    paper.print(progress.drawn())
    assert not paper.export_text().splitlines()[0].strip(), "a round ends what went on"


def test_time_left_is_that_of_the_rounds_still_possible() -> None:
    job_started = a_start()
    assert time_left([], 20) is None
    rounds = [a_round(index, job_started, seconds=100.0 if index == 0 else 2.0) for index in range(6)]
    assert time_left(rounds, 20) == pytest.approx(2.0 * 14)


def test_every_class_is_added_up() -> None:
    job_started = a_start()
    lost = (FailedTurn(client="silo-0", client_class="silo", reason="died"),)
    classes = {fleet.name: fleet for fleet in by_class(job_started, [a_round(0, job_started, failed_turns=lost)] * 2)}
    assert list(classes) == ["watch", "phone", "laptop", "silo"]
    assert (classes["watch"].clients, classes["watch"].excluded, classes["watch"].shortfall) == (0, 2, 8 * MIB)
    assert (classes["phone"].turns, classes["phone"].peak, classes["phone"].sent) == (6, 25 * MIB, 6000)
    assert (classes["silo"].turns, classes["silo"].failed_turns, classes["silo"].peak) == (0, 2, None)


def a_lean_opening() -> JobStarted:
    """The phones have room for a window of one adapter only, and stream."""
    job_started = a_start()
    lean = {"window": 1, "micro_batch": 4, "weights": "streamed", "planned_bytes": 20 * MIB}
    admitted = [
        client.model_copy(update=lean if client.client_class == "phone" else {}) for client in job_started.admitted
    ]
    return job_started.model_copy(update={"admitted": tuple(admitted)})


def two_stages(job_started: JobStarted) -> list[Round]:
    """Two rounds, in which a turn ran again and a client was excluded."""
    everyone = clients_of(job_started.admitted)
    of_stage = [
        [
            turn.model_copy(update={"client": name, "client_class": client.client_class, "weights": client.weights,
                                    "budget_bytes": client.budget_bytes, "planned_bytes": client.planned_bytes,
                                    "micro_batch": client.micro_batch, "bottom": 4 + stage - client.window,
                                    "peak_bytes": client.planned_bytes - (1 + stage) * MIB})
            for turn, (name, client) in zip(a_round(stage, job_started).turns, (everyone[0], everyone[8]), strict=False)
        ]
        for stage in range(2)
    ]  # fmt: skip
    of_stage[1][0] = of_stage[1][0].model_copy(update={"exceeded": "BudgetExceeded: too much", "micro_batch": 2})
    lost = (
        FailedTurn(client="phone-7", client_class="phone", reason="BudgetExceeded: far too much", over_budget=True),
    )
    return [
        a_round(0, job_started, turns=tuple(of_stage[0]), ended="converged"),
        a_round(
            1, job_started, stage=1, bottom=3, top=4, turns=tuple(of_stage[1]), failed_turns=lost, ended="round limit"
        ),
    ]


def test_leaner_plans_are_told_in_words() -> None:
    job_started = a_lean_opening()
    console = a_console()
    with ProgressDisplay(console, "tiny", SPEC) as progress:
        told(progress, job_started, two_stages(job_started))
    text = " ".join(console.export_text().split())
    assert "phone (8): windows of 1, 4 examples at a time, weights streamed" in text
    assert "laptop (3)" not in text
    assert (
        "phone-0 ran its turn again, windows of 1, 2 examples at a time, weights streamed: BudgetExceeded: too much"
        in text
    )
    assert "phone-7: BudgetExceeded: far too much; it is excluded from now on" in text


def test_ranks_that_are_left_out_are_told_in_words() -> None:
    whole = TurnSettings(2, 4, "resident", False, False, None)
    assert in_words({whole}) == "windows of 2, 4 examples at a time"
    fewer = {whole._replace(rank=1), whole._replace(rank=3)}
    assert in_words(fewer) == "windows of 2, 4 examples at a time, the first 1–3 of each LoRA's ranks"


def test_who_exceeded_a_plan_is_in_the_results_and_on_the_panel() -> None:
    job_started = a_lean_opening()
    rounds = two_stages(job_started)
    paper = a_console()
    paper.print(results(SPEC, job_started, rounds, FINISHED))
    progress = ProgressDisplay(a_console(terminal=True), "tiny", SPEC)
    told(progress, job_started, rounds)
    paper.print(progress.panel())
    text = paper.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    for fact in (
        "windows of 1, 2–4 examples at a time, weights streamed",
        "exceeded its plan in round 2, and ran again",
        "exceeded every plan in round 2: excluded since",
        "2 done (1 retried), 1 failed",
        "11 take part",
    ):
        assert fact in text
    cells = [line.split() for line in text.splitlines()]
    assert ["phone", "8", "64MiB", "20MiB", "19MiB", "2", "1", "1", "2KiB"] in cells
    assert ["1", "2–3", "19.0", "/", "20.0", "29.0", "/", "30.0"] in cells
    assert ["2", "3–4", "18.0", "/", "20.0", "28.0", "/", "30.0"] in cells


def test_the_result_has_every_class_in_every_stage() -> None:
    job_started = a_lean_opening()
    found = JobResult.of("tiny", job_started, two_stages(job_started), FINISHED).memory
    assert [(part.stage, part.client_class, part.turns, part.exceeded) for part in found] == [
        (0, "phone", 1, 0), (0, "laptop", 1, 0), (1, "phone", 1, 1), (1, "laptop", 1, 0),
    ]  # fmt: skip
    assert found[2].model_dump() == {
        "stage": 1, "bottom": 3, "top": 4, "client_class": "phone", "budget_bytes": 64 * MIB,
        "planned_bytes": 20 * MIB, "peak_bytes": 18 * MIB, "turns": 1, "exceeded": 1,
    }  # fmt: skip


@given(st.permutations(range(4)))
def test_the_memory_of_a_stage_is_the_most_of_its_turns(order: list[int]) -> None:
    turns = [
        a_round(0, a_start()).turns[0].model_copy(update={"peak_bytes": peak, "planned_bytes": planned})
        for peak, planned in ((None, 5), (3, 9), (7, 8), (None, 1))
    ]
    rounds = [a_round(index, a_start(), turns=(turns[place],)) for index, place in enumerate(order)]
    (found,) = StageMemory.of(rounds)
    assert (found.peak_bytes, found.planned_bytes, found.turns) == (7, 9, 4)


def test_the_progress_of_a_job_says_how_turns_are_taken() -> None:
    job_started = a_lean_opening()
    planned = Resource.of(job_started, None)
    assert planned.memory["phone"].model_dump() == {
        "budget": 64 * MIB, "planned": 20 * MIB, "peak": None, "window": 1, "micro_batch": 4, "weights": "streamed",
        "activations_offloaded": False,
        "activations_recomputed": False,
    }  # fmt: skip
    assert (planned.bottom, planned.top, planned.exceeded) == (2, 3, 0)
    newest = Resource.of(job_started, two_stages(job_started)[1])
    phone, laptop, silo = (newest.memory[name] for name in ("phone", "laptop", "silo"))
    assert (phone.peak, phone.micro_batch, phone.window, newest.exceeded) == (18 * MIB, 2, 1, 1)
    assert (laptop.peak, laptop.window, silo.peak, silo.window) == (28 * MIB, 2, None, 2)


def test_the_results_fit_a_terminal_whatever_is_not_known() -> None:
    job_started = a_start().model_copy(update={"cka": ()})
    turn = a_round(0, job_started).turns[0].model_copy(update={"peak_bytes": None})
    rounds = [a_round(0, job_started, accuracy=None, turns=(turn,), ended="converged: " + "a long reason " * 8)]
    console = a_console()
    console.print(results(SPEC, job_started, rounds, FINISHED))
    text = console.export_text()
    assert "72.8% (loss 0.800)" in text
    assert "lacks 8MiB" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def changed(job_started: JobStarted, **changes: Any) -> tuple[Turn, ...]:
    """The turns of a round, which differ in ``changes``."""
    return tuple(turn.model_copy(update=changes) for turn in a_round(0, job_started).turns)


def many_rounds(job_started: JobStarted) -> list[Round]:
    return [a_round(i, job_started, stage=i // 7, bottom=2 + i // 7, top=3 + i // 7, accuracy=0.5) for i in range(200)]


CASES = ["usual", "none", "one", "many", "cyclic", "crowded", "no profile", "exits", "unmeasured", "again", "unequal"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_plots_of_any_job(tmp_path: Path, case: str) -> None:
    job_started = a_start()
    rounds = [a_round(index, job_started) for index in range(20)]
    if case == "none":
        rounds = []
    elif case == "one":
        rounds = rounds[:1]
    elif case == "many":
        job_started = a_start(layers=32)
        rounds = many_rounds(job_started)
    elif case == "cyclic":
        rounds = [a_round(i, job_started, bottom=2 + i % 3, top=3 + i % 3) for i in range(20)]
    elif case == "crowded":
        fleet = tuple((f"{'a-very-long-class-name-' * 3}{index}"[:63], 2**index, 2) for index in range(3, 15))
        job_started = a_start(fleet=fleet)
        rounds = [a_round(0, job_started)]
    elif case == "no profile":
        job_started = job_started.model_copy(update={"cka": ()})
    elif case == "exits":
        job_started = job_started.model_copy(update={"cka": (), "exits": EXITS})
    elif case == "unmeasured":
        rounds = [a_round(0, job_started, turns=changed(job_started, peak_bytes=None))]
    elif case == "again":
        rounds = [a_round(0, job_started, turns=changed(job_started, exceeded="BudgetExceeded"))]
    elif case == "unequal":
        rounds = [
            a_round(0, job_started),
            a_round(1, job_started, turns=changed(job_started, planned_bytes=MIB, client_class="silo")),
        ]
    paths = draw(tmp_path, job_started, rounds, FINISHED if rounds else None, 0.8)
    assert len(paths) == (3 if case == "no profile" else 4)
    for path in paths:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1200, 750)


@pytest.mark.slow
def test_a_plot_shows_its_data(tmp_path: Path) -> None:
    job_started = a_start()
    usual = pictures(tmp_path, [a_round(0, job_started)], 0.8)
    for changes, threshold, names in (
        ({"accuracy": 0.9}, 0.7, {"accuracy.png", "start-layer.png"}),
        ({"turns": changed(job_started, peak_bytes=20 * MIB)}, 0.8, {"memory.png", "memory-by-round.png"}),
        ({"turns": changed(job_started, exceeded="BudgetExceeded")}, 0.8, {"memory-by-round.png"}),
    ):
        drawn = pictures(tmp_path, [a_round(0, job_started, **changes)], threshold)
        assert {name for name, data in drawn.items() if data != usual[name]} == names


@pytest.mark.slow
def test_a_bar_below_nothing_keeps_its_number(tmp_path: Path) -> None:
    """The bar itself is not to be seen: an estimate of CKA may be less than 0."""
    drawn = []
    for value in (-0.1, -0.2):
        job_started = a_start(layers=4).model_copy(update={"cka": (1.0, 0.5, 0.2, value)})
        (start,) = [path for path in draw(tmp_path, job_started, [], None, 0.8) if path.name == "start-layer.png"]
        drawn.append(start.read_bytes())
    assert drawn[0] != drawn[1]


def pictures(folder: Path, rounds: list[Round], threshold: float) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in draw(folder, a_start(), rounds, FINISHED, threshold)}
