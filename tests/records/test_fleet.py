"""Promises of the list of clients: its sums by class and plan are right and few, and it is read in pages."""

from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.errors import CorruptCommit
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.planning.admission import listed
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.fleet import CLIENTS_FILE, FleetTotals, clients_in, names_hash
from tests.builders import a_job
from tests.pools import Nobody


@pytest.fixture
def mixed_job(document: dict[str, Any], tmp_path: Path) -> PlannedJob:
    """A job with shares of unequal sizes, of two classes that take part and one that cannot."""
    document["fleet"] = {
        "partition": {"scheme": "quantity", "alpha": 0.3},
        "clients": [
            {"name": "watch", "count": 3, "memory": "1KiB"},
            {"name": "phone", "count": 9, "memory": "64MiB"},
            {"name": "laptop", "count": 4, "memory": "256MiB"},
        ],
    }
    return a_job(document, tmp_path)


def test_the_sums_are_those_of_the_lines(mixed_job: PlannedJob, tmp_path: Path) -> None:
    started = Coordinator(mixed_job, Nobody(), CommitLog(tmp_path / "log")).open()
    lines = clients_in(tmp_path / "log")
    assert lines == CommitLog(tmp_path / "log").clients()
    assert [line.client for line in lines] == [
        *(f"phone-{place}" for place in range(9)), *(f"laptop-{place}" for place in range(4)),
        *(f"watch-{place}" for place in range(3)),
    ]  # fmt: skip
    assert (started.taking_part, started.left_out) == (13, 3)
    for place, group in enumerate(started.admitted):
        members = [line for line in lines if line.plan == place]
        assert {line.client_class for line in members} == {group.client_class}
        assert {min(line.examples, 8) for line in members} == {group.batch}
        assert (len(members), sum(line.examples for line in members)) == (group.clients, group.examples)
        assert max(line.planned_bytes or 0 for line in members) == group.planned_bytes
    (watches,) = started.excluded
    assert watches.clients == 3
    assert max(line.shortfall_bytes or 0 for line in lines) == watches.shortfall_bytes > 0
    assert "short of the smallest window" in watches.reason
    assert sum(line.examples for line in lines) == len(mixed_job.manifest.clients) * 6 == 96
    assert started.clients_hash == names_hash(line.client for line in lines if line.plan is not None)


def test_equal_plans_are_one_sum_however_many_clients(mixed_job: PlannedJob) -> None:
    """With shares of n examples each, there is one sum for each class."""
    stage = mixed_job.chain_from(1).lowest
    totals = FleetTotals()
    for _ in range(50):
        list(listed(mixed_job.planner, mixed_job.admission, stage, totals))
    assert sum(group.clients for group in totals.admitted) == 50 * 13
    assert len(totals.admitted) <= 2 * 8, "a class and the size of its largest batch"
    assert [group.clients for group in totals.excluded] == [150]


def test_pages_are_parts_of_the_list(mixed_job: PlannedJob, tmp_path: Path) -> None:
    assert clients_in(tmp_path / "log") == []
    Coordinator(mixed_job, Nobody(), CommitLog(tmp_path / "log")).open()
    everyone = clients_in(tmp_path / "log")
    for after, limit in ((0, 5), (5, 5), (14, 5), (16, 1), (99, 3)):
        assert clients_in(tmp_path / "log", after, limit) == everyone[after : after + limit]


def test_a_line_that_was_not_written_is_named(mixed_job: PlannedJob, tmp_path: Path) -> None:
    Coordinator(mixed_job, Nobody(), log := CommitLog(tmp_path / "log")).open()
    (tmp_path / "log" / CLIENTS_FILE).write_text('{"client": "phone-0"}\n')
    with pytest.raises(CorruptCommit, match=r"clients\.jsonl"):
        log.clients()
