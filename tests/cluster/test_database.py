"""Promises of the door to the database: one that hangs is taken for away, and what another process does is waited for."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from time import monotonic

import pytest
from sqlalchemy import event, text

from chainfed_ray.cluster import database, schema
from chainfed_ray.cluster.database import NO_ANSWER, is_in_doubt, open_database
from chainfed_ray.cluster.jobs.store import JobStore
from tests import postgres
from tests.builders import SPEC
from tests.lacking import without
from tests.watching import wait_for

pytestmark = pytest.mark.slow
PATIENCE = 1.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[postgres.Server]:
    if (programs := postgres.installed()) is None:
        without("no PostgreSQL server is installed")
    monkeypatch.setattr(database, "PATIENCE_SECONDS", PATIENCE)
    monkeypatch.setattr(database, "CONNECT_SECONDS", 2)
    with postgres.server(programs) as started:
        yield started


def test_a_server_that_hangs_does_not_answer_and_is_asked_again_when_it_runs(server: postgres.Server) -> None:
    with closing(JobStore(server.url)) as store:
        job = store.submit(SPEC).id
        for away, back in ((server.freeze, server.thaw), (server.stop, server.start)):
            away()
            began = monotonic()
            with pytest.raises(NO_ANSWER):
                store.page()
            assert monotonic() - began < 30
            back()

            def found() -> list[str]:
                try:
                    return [record.id for record in store.page()]
                except NO_ANSWER:  # it starts
                    return []

            assert wait_for(found, "answer", 60) == [job]


def test_a_commit_that_is_lost_may_be_done_and_other_statements_are_not(server: postgres.Server) -> None:
    engine = open_database(server.url, existing=True)

    def make(table: str) -> None:
        with engine.begin() as connection:
            connection.execute(text(f"create table {table} (number integer)"))

    def made(table: str) -> bool | None:
        try:
            with engine.connect() as connection:
                return bool(connection.scalar(text("select to_regclass(:name) is not null").bindparams(name=table)))
        except NO_ANSWER:  # connections that were open are lost
            return None

    make("first")
    server.freeze()
    with pytest.raises(NO_ANSWER) as asked:
        make("second")
    assert not is_in_doubt(asked.value)
    server.thaw()
    wait_for(lambda: made("first"), "answer", 60)
    event.listen(engine, "commit", lambda _: server.freeze(), once=True)
    with pytest.raises(NO_ANSWER) as lost:
        make("third")
    assert is_in_doubt(lost.value)
    server.thaw()
    wait_for(lambda: made("third"), "table, whose commit the server had got", 60)
    assert made("second") is False
    engine.dispose()


def test_who_changes_tables_waits_for_another_that_does(server: postgres.Server) -> None:
    other = open_database(server.url, existing=True)
    with ThreadPoolExecutor(1) as threads:
        with other.begin() as connection:
            connection.execute(text("select pg_advisory_xact_lock(:lock)").bindparams(lock=schema.LOCK))
            opened = threads.submit(schema.open_tables, server.url)
            ends = monotonic() + 3 * PATIENCE
            wait_for(lambda: opened.done() or monotonic() > ends, "end of the patience")
            assert not opened.done()
        opened.result(60).dispose()
    assert schema.version_of(other) == schema.VERSIONS[-1]
    other.dispose()


def test_connections_that_are_made_at_the_same_moment_to_a_new_file_wait_for_each_other(tmp_path: Path) -> None:
    """SQLite answers "locked" at once, whatever its time-out, when two connections turn its write-ahead log on together."""

    def use(url: str) -> str:
        engine = open_database(url, existing=False)
        with engine.connect() as connection:
            mode: str = connection.exec_driver_sql("pragma journal_mode").scalar_one()
        engine.dispose()
        return mode

    with ThreadPoolExecutor(6) as threads:
        for index in range(40):
            assert set(threads.map(use, [f"sqlite:///{tmp_path}/{index}.db"] * 6)) == {"wal"}
