"""Promises of the audit log: what is in it stays, whoever writes, and a flood of refusals does not fill it."""

import logging
from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from chainfed_ray.cluster.access.audit import REFUSALS_A_MINUTE, Act, AuditLog

ACT = Act("alice", "0123", "POST /v1/jobs", "/v1/jobs/x", "10.1.2.3", "201", "r")


@pytest.fixture
def log(database: str) -> Iterator[AuditLog]:
    made = AuditLog(database)
    yield made
    made.close()


@pytest.mark.slow
def test_entries_come_in_pages_the_newest_first(log: AuditLog) -> None:
    for number in range(5):
        log.note(Act("alice", "0123", "POST /v1/jobs", f"/v1/jobs/{number}", "10.1.2.3", "201", "r"))
    first = log.page(2)
    assert [entry.target for entry in first] == ["/v1/jobs/4", "/v1/jobs/3"]
    assert [entry.target for entry in log.page(9, first[-1].number)] == ["/v1/jobs/2", "/v1/jobs/1", "/v1/jobs/0"]
    assert first[0].at >= first[1].at
    assert len(log.page(9, 2**63 - 1)) == 5
    assert (first[0].tenant, first[0].key, first[0].outcome) == ("alice", "0123", "201")


@pytest.mark.parametrize("change", ["update audit set tenant = 'bob'", "delete from audit"])
def test_the_database_refuses_to_change_it(log: AuditLog, database: str, change: str) -> None:
    log.note(ACT)
    before = log.page()
    engine = create_engine(database)
    with pytest.raises(DBAPIError, match="append-only"), engine.begin() as connection:
        connection.execute(text(change))
    engine.dispose()
    assert log.page() == before


def test_what_a_caller_makes_up_is_kept_short_and_whole(log: AuditLog) -> None:
    log.note(Act(None, None, "PUT\0", "/" + "x" * 10_000, "here", "401"))
    (entry,) = log.page()
    assert (entry.action, len(entry.target)) == ("PUT�", 300)


@pytest.mark.slow
def test_refusals_do_not_fill_it(database: str, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = AuditLog(database, clock=lambda: now[0])
    for _ in range(REFUSALS_A_MINUTE + 25):
        log.note(ACT, is_refusal=True)
    log.note(ACT)
    assert len(log.page(1000)) == REFUSALS_A_MINUTE + 1
    now[0] = 61.0
    with caplog.at_level(logging.WARNING):
        log.note(ACT, is_refusal=True)
    assert "25 refusals are not in the audit log" in caplog.text
    assert len(log.page(1000)) == REFUSALS_A_MINUTE + 2
    log.close()


@pytest.mark.slow
def test_a_database_that_does_not_take_it_down_stops_nobody(
    log: AuditLog, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_engine(database)
    with engine.begin() as connection:
        connection.execute(text("drop table audit"))
    engine.dispose()
    log.note(ACT)
    assert "not in the audit log" in caplog.text
    assert "/v1/jobs/x" in caplog.text
