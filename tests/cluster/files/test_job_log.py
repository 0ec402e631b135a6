"""Promises of a job's log: it tells what happened, once, whoever is killed, and has no row of data."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.activity import Activity, no_listener
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.cluster.files.job_log import LOG, WITHHELD, JobLog, lines_of, page_of
from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import CoordinatorLost, InvalidJob
from chainfed_ray.federation.run import in_this_process
from chainfed_ray.records.log_line import LogLine
from chainfed_ray.records.rounds import FailedTurn, Round
from chainfed_ray.spec.parse import parse_job
from tests.pools import Killed, dying

ROW = "a row that nobody may see"
REASONS = (f"ValueError: {ROW}", "BudgetExceeded: the turn took 3 MiB", "missed the deadline of 5 s: it was training")


def a_round(failed: list[FailedTurn], index: int = 0) -> Round:
    """A round of which every turn failed."""
    return Round(
        index=index, stage=0, bottom=1, top=2, turns=(), failed_turns=tuple(failed), counted=False, train_loss=None,
        held_out_loss=None, accuracy=None, movement=None, ended=None, seconds=1.0,
    )  # fmt: skip


def messages(folder: Path) -> list[str]:
    return [line.message for line in lines_of(folder / LOG)]


def test_lines_are_read_in_pages_and_half_lines_are_not(tmp_path: Path) -> None:
    with JobLog(tmp_path) as log:
        for number in range(5):
            log.note("info", f"phone-{number}", f"turn {number}", a_round([], number))
    with (tmp_path / LOG).open("ab") as file:
        file.write(b'{"at": "who wrote th')
    first, after = page_of(tmp_path / LOG, 0, 4)
    assert [line.source for line in first] == ["coordinator", "phone-0", "phone-1", "phone-2"]
    rest, end = page_of(tmp_path / LOG, after, 4)
    assert [line.round for line in rest] == [4, 5]
    assert page_of(tmp_path / LOG, end, 4) == ([], end)
    JobLog(tmp_path).note("error", "coordinator", "goes on")
    assert [line.message for line in page_of(tmp_path / LOG, end, 4)[0]] == ["goes on"]
    assert page_of(tmp_path / "none", 0, 4) == ([], 0)


def test_activities_and_what_our_code_logs_are_in_it(tmp_path: Path) -> None:
    ours, others = logging.getLogger("chainfed_ray.somewhere"), logging.getLogger("somebody")
    with JobLog(tmp_path) as log:
        listen = log.with_activities(no_listener)
        for what in ("training", "training", "evaluating"):
            listen(Activity(what=what))
        ours.warning("the disk is %s", "slow")
        ours.warning("it waits: %s, %s", KeyError(ROW), OSError(28, "full"))
        others.warning(ROW)
        ours.error(ROW, extra=WITHHELD)
        try:
            raise ValueError(ROW)
        except ValueError:
            ours.exception("it failed")
        log.failed(KeyError(ROW))
        log.failed(InvalidJob.at("data.label", ROW, ROW))
        log.failed(CoordinatorLost("a", 5))
        turns = [FailedTurn(client="phone-0", client_class="phone", reason=reason) for reason in REASONS]
        log.tell(a_round(turns))
    ours.warning("after the end")
    found = messages(tmp_path)
    assert found[1:5] == ["training", "evaluating", "the disk is slow", "it waits: KeyError, [Errno 28] full"]
    del found[4]
    assert found[4].startswith("it failed (ValueError < test_job_log.py:")
    failures = [message.removeprefix("the job has failed: ").partition("; the words are")[0] for message in found[5:8]]
    assert failures[:2] == ["KeyError", "InvalidJob: data.label"]
    assert failures[2].startswith("CoordinatorLost: the coordinator of a died 5 times")
    assert found[8:11] == [
        "its turn failed: ValueError (the words are in the record of the round)",
        f"its turn failed: {REASONS[1]}",
        f"its turn failed: {REASONS[2]}",
    ]
    assert ROW not in (tmp_path / LOG).read_text()


def test_a_log_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with JobLog(tmp_path / "file" / "job") as log:
        log.note("info", "coordinator", "x")
    assert messages(tmp_path / "file" / "job") == []


@pytest.mark.slow
def test_a_job_that_is_killed_and_resumed_logs_each_round_once(
    store: JobStore, storage: Storage, document: dict[str, Any], tiny_data: Path
) -> None:
    document["rounds"] |= {"total": 3, "clients": 2}
    job = store.submit(parse_job(document)).id
    store.move(job, "running")
    with pytest.raises(Killed):
        run_queued_job(job, storage, lambda source, note: dying(LocalPool(source), turns=3))
    run_queued_job(job, storage, in_this_process)
    folder = storage.job(job)
    found = list(lines_of(folder / LOG))
    rounds = [line for line in found if line.source == "coordinator" and line.round is not None]
    assert [line.round for line in rounds] == [1, 2, 3]
    turns = [line for line in found if line.source.startswith("phone-")]
    assert [line.round for line in turns] == [1, 1, 2, 2, 3, 3]
    assert all("steps on" in line.message for line in turns)
    assert sum(line.message == "the process of the coordinator begins" for line in found) == 2
    assert sum(line.message.startswith("the job is done after 3 rounds") for line in found) == 1
    text = (folder / LOG).read_text()
    assert not any(json.loads(row)["text"] in text for row in tiny_data.read_text().splitlines())


def test_a_job_that_fails_says_why(store: JobStore, storage: Storage, document: dict[str, Any], tmp_path: Path) -> None:
    document["data"]["train"] = f"path:{tmp_path / 'none.csv'}"
    job = store.submit(parse_job(document)).id
    store.move(job, "running")
    run_queued_job(job, storage, in_this_process)
    line = list(lines_of(storage.job(job) / LOG))[-1]
    assert isinstance(line, LogLine)
    assert (line.level, line.message[:42]) == ("error", "the job has failed: InvalidJob: data.train")
