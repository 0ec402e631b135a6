"""Promises of activities: they are true, nothing depends on who listens, and what takes long is never silent."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from io import StringIO
from itertools import pairwise
from pathlib import Path
from time import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from chainfed_ray.activity import Activity, Listener, Notes, Reporter, no_listener
from chainfed_ray.api.report.activity_display import ActivityDisplay
from chainfed_ray.api.report.activity_log import ActivityLog, in_words
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.planning.dry_run import dry_run
from chainfed_ray.planning.prepare import prepare_job
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.spec.parse import parse_job
from tests.builders import assert_same
from tests.watching import wait_for


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.booleans())
def test_no_more_is_done_than_there_is_and_in_the_end_all_of_it(sizes: list[int], one_by_one: bool) -> None:
    heard: list[Activity] = []
    reporter, total = Reporter("counting", heard.append), len(sizes) if one_by_one else sum(sizes)
    each = reporter.each(sizes, total, "rows") if one_by_one else reporter.each(sizes, total, "rows", int)
    assert list(each) == sizes
    done = [activity.done for activity in heard]
    assert done == sorted(done)
    assert all(0 <= count <= total for count in done)
    assert {(activity.what, activity.total, activity.unit, activity.since) for activity in heard} <= {
        ("counting", total, "rows", heard[0].since if heard else None)
    }
    if total:
        assert (done[0], done[-1], heard[0].seconds_left, heard[-1].seconds_left) == (0, total, None, 0.0)


def test_what_is_left_is_estimated_by_what_is_done() -> None:
    """Once more than the first part is: until then processes may have to start."""
    heard: list[Activity] = []
    tell = Reporter("counting", heard.append).count(4, "rows")
    for done in range(5):
        tell(done)
    first, *none, third, fourth, last = [activity.seconds_left for activity in heard]
    assert (first, none, last) == (None, [None, None], 0.0)
    assert third is not None
    assert fourth is not None
    assert third > 0 < fourth


def test_what_is_counted_wrongly_is_not_told_wrongly() -> None:
    heard: list[Activity] = []
    assert list(Reporter("counting", heard.append).each("abc", 2, "rows")) == ["a", "b", "c"]
    assert [activity.done for activity in heard] == [0, 1, 2, 2]


def test_a_note_is_on_whatever_goes_on_until_it_is_taken_off() -> None:
    heard: list[Activity] = []
    notes = Notes(heard.append)
    notes.note("no process has started")
    for place in Reporter("counting", notes).each(range(2), 2, "rows"):
        notes.note(None if place else "one process has started")
        notes.note(None if place else "one process has started")
    assert [(activity.done, activity.note) for activity in heard] == [
        (0, "no process has started"), (0, "one process has started"), (1, "one process has started"), (1, None), (2, None),
    ]  # fmt: skip
    assert in_words(heard[1], 5.0) == "Counting: 0 of 2 rows, 5s so far; one process has started"


@pytest.mark.parametrize("listen", [no_listener, lambda activity: None])
def test_no_item_is_held_while_the_next_is_made(listen: Listener) -> None:
    """A layer of a model, say: two of them in memory are planned for, and not three."""

    class Layer:
        pass

    def made() -> Iterator[Layer]:
        before: weakref.ref[Layer] | None = None
        for _ in range(3):
            assert before is None or before() is None
            layer = Layer()
            before = weakref.ref(layer)
            yield layer
            del layer

    for layer in Reporter("loading", listen).each(made(), 3, "layers"):
        del layer
    gc.collect()


def an_activity(began: float, **changes: Any) -> Activity:
    fields = {"what": "fitting the head", "total": 12, "unit": "clients", "since": datetime.fromtimestamp(began, UTC)}
    return Activity.model_validate(fields | changes)


class Log:
    """A log that is written by a clock of its own."""

    def __init__(self) -> None:
        self.now, self.lines = 1000.0, list[str]()
        self.log = ActivityLog(self.lines.append, lambda: self.now)

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.log.tick()


def test_what_takes_long_is_in_a_log_from_its_first_seconds_to_its_end() -> None:
    log = Log()
    activity = an_activity(log.now)
    log.log(activity)
    log.wait(2)
    assert log.lines == []
    log.wait(2)
    log.log(activity.model_copy(update={"done": 3, "seconds_left": 30.0}))
    log.wait(10)
    log.log(activity.model_copy(update={"done": 12, "seconds_left": 0.0}))
    log.log(an_activity(log.now, what="saving the model", total=None, unit=None))
    assert log.lines == [
        "Fitting the head: 0 of 12 clients, 3s so far.",
        "Fitting the head: 3 of 12 clients, 13s so far, about 21s left.",
        "Fitting the head: done in 14s.",
    ]
    log.wait(4)
    log.log.end()
    log.wait(60)
    assert log.lines[3:] == ["Saving the model, 3s so far."], "it was over soon, and nothing goes on since"


@pytest.mark.slow
@given(st.integers(1, 40), st.integers(0, 30))
def test_a_log_is_never_silent_for_long_and_never_long(minutes: int, told_every: int) -> None:
    """Whether or not anything is heard of what goes on."""
    log = Log()
    began, said_at = log.now, [log.now]
    log.log(an_activity(began))
    for second in range(minutes * 60):
        if told_every and second % told_every == 0:
            log.log(an_activity(began, done=second % 12))
        before = len(log.lines)
        log.wait(1)
        said_at += [log.now] * (len(log.lines) - before)
    gaps = [after - before for before, after in pairwise(said_at)]
    assert all(gap <= max(10, 0.1 * (at - began)) + 1 for gap, at in zip(gaps, said_at[1:], strict=True))
    assert len(log.lines) <= 60


def test_where_there_is_no_terminal_a_command_writes_lines_by_itself() -> None:
    """Also while nothing is heard of what goes on."""
    written = StringIO()
    with ActivityDisplay(Console(file=written, width=80)) as listen:
        listen(an_activity(time() - 10, done=2))
        wait_for(lambda: "Fitting the head: 2 of 12 clients, " in written.getvalue(), "line")
    assert "Fitting the head: done in " in written.getvalue()
    assert "\x1b" not in written.getvalue()


def test_an_estimate_that_is_used_up_is_not_told() -> None:
    activity = an_activity(0, done=3, seconds_left=4.0)
    assert in_words(activity, 10.0).endswith("3 of 12 clients, 10s so far, about 4s left")
    assert in_words(activity, 20.0, silent=10.0).endswith("3 of 12 clients, 20s so far")
    assert in_words(Activity(what="saving the model"), 61.0) == "Saving the model, 1m 01s so far"


def trained(document: dict[str, Any], folder: Path, listen: Listener) -> tuple[Tensors, list[dict[str, Any]]]:
    """The stack of a job that is run with ``listen``, and its records without their times."""
    job = prepare_job(parse_job(document), folder / "scratch", listen)
    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(folder / "log"), listen=listen)
    rounds = list(coordinator.rounds())
    coordinator.finish()
    records = [record.model_dump(exclude={"seconds", "turns", "head_fit", "early_exit"}) for record in rounds]
    for record in records:
        if evaluation := record["evaluation"]:
            record["evaluation"] = {key: evaluation[key] for key in ("loss", "accuracy", "macro_f1", "failure")}
    return coordinator.stack().tensors(), records


EACH_START: Sequence[dict[str, Any]] = (
    {"start": "auto", "head": "fitted"},
    {"start": "best-exit", "head": "fitted"},
    {"start": 1, "head": "zero"},
)


@pytest.mark.slow
@pytest.mark.parametrize("chain", EACH_START, ids=lambda chain: str(chain["start"]))
def test_a_job_is_the_same_bit_for_bit_whoever_listens(
    document: dict[str, Any], tmp_path: Path, chain: dict[str, Any]
) -> None:
    document["chain"] |= chain
    heard: list[Activity] = []
    told, told_records = trained(document, tmp_path / "told", heard.append)
    silent, silent_records = trained(document, tmp_path / "silent", no_listener)
    assert_same(told, silent)
    assert told_records == silent_records
    whats = [activity.what for activity in heard]
    expected = {
        "reading the data",
        "making tokens of the train rows",
        "tracing the memory of the model's parts",
        "planning the clients with windows of 2",
        "round 1 of 4: training",
        "evaluating the whole model (validation)",
        "evaluating the whole model (test)",
    }
    of_start = {"auto": "profiling the layers", "best-exit": "fitting a head to exit 1 of 3"}
    expected |= {of_start[chain["start"]], "fitting the head of stage 1"} if chain["head"] == "fitted" else set()
    assert expected <= set(whats)
    for activity in heard:
        assert activity.total is None or 0 <= activity.done <= activity.total
    turns = [activity for activity in heard if activity.what == "round 1 of 4: training"]
    assert [(turn.done, turn.total, turn.unit) for turn in turns] == [(done, 3, "clients") for done in range(4)]


@pytest.mark.slow
def test_a_dry_run_says_what_it_does(document: dict[str, Any]) -> None:
    heard: list[Activity] = []
    dry_run(parse_job(document), 1, heard.append)
    whats = [activity.what for activity in heard]
    for what in ("reading the data", "timing an evaluation", "timing turns of each class"):
        assert what in whats
    assert whats[-1] == "looking for changes that would let more clients join"


@pytest.mark.slow
def test_what_a_listener_raises_ends_the_work_and_costs_nothing_else(document: dict[str, Any], tmp_path: Path) -> None:
    expected, _ = trained(document, tmp_path / "silent", no_listener)

    def closed(activity: Activity) -> None:
        if activity.what.startswith("round 3"):
            raise BrokenPipeError("nobody reads this any more")

    with pytest.raises(BrokenPipeError):
        trained(document, tmp_path / "told", closed)
    assert len(CommitLog(tmp_path / "told" / "log").rounds()) == 2
    found, _ = trained(document, tmp_path / "told", no_listener)
    assert_same(found, expected)
