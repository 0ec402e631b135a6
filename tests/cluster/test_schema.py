"""Promise: a database goes forward from every version with its rows, and back; a step that fails leaves it as it was."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, event, inspect, text
from sqlalchemy.exc import DBAPIError

from chainfed_ray.cluster.database import open_database
from chainfed_ray.cluster.jobs.control import delete
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.schema import VERSIONS, migrate, open_tables, version_of
from chainfed_ray.cluster.tables import TABLES
from chainfed_ray.errors import InvalidSetting
from tests.builders import SPEC
from tests.watching import wait_for

JOBS = (("done", "succeeded"), ("going", "running"), ("next", "queued"))


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    made = open_database(database, existing=False)
    yield made
    made.dispose()


def write(engine: Engine, *statements: str, **values: Any) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement), values)


def rows(engine: Engine, question: str) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(question))]


def first_version(engine: Engine) -> None:
    """Make a database as the version left it that marked it in a table of its own, with jobs, events and an alias."""
    migrate(engine, "0001")
    write(engine, "drop table chainfed_version")
    for name, status in JOBS:
        job = {"id": f"{name}-1", "name": name, "status": status}
        write(
            engine,
            "insert into jobs (id, name, model, spec, status, starts, submitted_at) "
            "values (:id, :name, 'tiny', '{}', :status, 0, '2026-10-01T00:00:00.000Z')",
            "insert into events (job, seq, key, kind, at, data) "
            "values (:id, 1, 'queued', 'queued', '2026-10-01T00:00:00.000Z', '{}')",
            **job,
        )
    write(engine, """insert into aliases (name, targets) values ('support', '[{"tiny": 1.0}]')""")


@pytest.mark.slow
def test_the_steps_make_the_tables_of_the_code(engine: Engine, database: str) -> None:
    open_tables(database).dispose()
    options = {"compare_type": True, "version_table": "chainfed_version"}
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts=options), TABLES) == []
    write(engine, "insert into audit (at, action, target, address, outcome) values ('now', 'a', 'b', 'c', '200')")
    for change in ("update audit set action = 'x'", "delete from audit"):
        with pytest.raises(DBAPIError, match="append-only"):
            write(engine, change)


@pytest.mark.slow
def test_forward_and_back_with_the_rows_of_the_version_before(engine: Engine, database: str) -> None:
    first_version(engine)
    before = {table: rows(engine, f"select * from {table} order by 1") for table in ("jobs", "events", "aliases")}
    assert version_of(engine) == "0001"

    store = JobStore(database, existing=True)
    found = {job.name: job for job in store.page()}
    assert [(name, found[name].status) for name, _ in JOBS] == list(JOBS)
    assert {(job.tenant, job.priority, job.version) for job in found.values()} == {("default", 0, 1)}
    assert [event.kind for event in store.events("done-1")] == ["queued"]
    assert store.aliases.all() == {"support": {"tiny": 1.0}}
    assert store.counts() == {"default": dict.fromkeys(("succeeded", "running", "queued"), 1)}
    later = store.submit(SPEC).id
    assert version_of(engine) == VERSIONS[-1]
    assert rows(engine, "select version from schema") == [(2,)], "by which older code knows that it is older"
    deleted = store.submit(SPEC).id
    store.move(deleted, "cancelled")
    delete(store, deleted)
    store.close()

    write(engine, "update jobs set status = 'paused' where id = :job", job=later)
    migrate(engine, "0001")
    assert rows(engine, "select version from schema") == [(1,)]
    assert rows(engine, f"select status from jobs where id = '{later}'") == [("queued",)]
    assert rows(engine, f"select id from jobs where id = '{deleted}'") == []
    write(engine, "delete from events where job = :job", "delete from jobs where id = :job", job=later)
    assert {table: rows(engine, f"select * from {table} order by 1") for table in before} == before
    assert set(inspect(engine).get_table_names()) == {*before, "schema", "chainfed_version"}

    migrate(engine, VERSIONS[-1])
    store = JobStore(database, existing=True)
    assert {job.name for job in store.page()} == {name for name, _ in JOBS}
    store.close()


@pytest.mark.slow
def test_what_is_kept_of_jobs_is_added_up_once_and_kept_from_then_on(engine: Engine, database: str) -> None:
    first_version(engine)
    migrate(engine, "0004")
    write(engine, "update jobs set kept_bytes = number * 100")
    kept = "select status, jobs, bytes from job_counts where jobs > 0 or bytes <> 0 order by bytes"
    store = JobStore(database, existing=True)
    assert rows(engine, kept) == [("succeeded", 1, 100), ("running", 1, 200), ("queued", 1, 300)]
    store.kept_bytes.note("done-1", 50)
    store.move("next-1", "paused")
    store.submit(SPEC)
    assert rows(engine, kept) == [("queued", 1, 0), ("succeeded", 1, 50), ("running", 1, 200), ("paused", 1, 300)]
    delete(store, "done-1")
    store.deletions.purge("done-1")
    assert rows(engine, kept) == [("queued", 1, 0), ("running", 1, 200), ("paused", 1, 300)]
    store.close()
    migrate(engine, "0004")
    write(engine, "update jobs set status = 'failed', kept_bytes = 7 where id = 'going-1'")
    left = "select status, jobs from job_counts where jobs > 0 order by status"
    assert rows(engine, left) == [("failed", 1), ("paused", 1), ("queued", 1)]
    migrate(engine, VERSIONS[-1])
    assert rows(engine, kept) == [("queued", 1, 0), ("failed", 1, 7), ("paused", 1, 300)]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["status = 'paused'", "kept_bytes = 5000"])
@pytest.mark.parametrize(("before", "after"), [("0004", "0005"), ("0005", "0004")])
def test_jobs_that_are_changed_while_bytes_are_added_up_are_counted(
    empty_postgresql: str, before: str, after: str, change: str
) -> None:
    engine, other = (open_database(empty_postgresql, existing=True) for _ in range(2))
    first_version(engine)
    migrate(engine, before)
    changes = list[Future[None]]()

    def has_come() -> bool:
        waiting = "select count(*) from pg_locks where not granted"
        return changes[0].done() or rows(other, waiting) != [(0,)]

    def meanwhile(_: object, __: object, statement: str, *___: object) -> None:
        if statement.startswith("drop trigger") and not changes:
            changes.append(threads.submit(write, other, f"update jobs set {change} where id = 'going-1'"))
            wait_for(has_come, "the change")

    event.listen(engine, "before_cursor_execute", meanwhile)
    with ThreadPoolExecutor(1) as threads:
        migrate(engine, after)
        changes[0].result(30)
    migrate(engine, VERSIONS[-1])
    counted = "select jobs, bytes from job_counts where jobs > 0 and status in ('running', 'paused')"
    assert rows(engine, counted) == [(1, 5000 if "bytes" in change else 0)]
    engine.dispose()
    other.dispose()


@pytest.mark.slow
def test_versions_of_others_in_the_same_database_are_not_ours(engine: Engine, database: str) -> None:
    write(
        engine,
        "create table alembic_version (version_num varchar(32))",
        "insert into alembic_version values ('c0ffee')",
    )
    JobStore(database).close()
    assert version_of(engine) == VERSIONS[-1]
    assert rows(engine, "select version_num from alembic_version") == [("c0ffee",)]


@pytest.mark.slow
def test_a_step_that_fails_leaves_the_database_as_it_was(engine: Engine, database: str) -> None:
    first_version(engine)
    write(engine, "create table answers (mine integer)")  # in the way of a late part of the step
    before = {table: inspect(engine).get_columns(table) for table in inspect(engine).get_table_names()}
    with pytest.raises(DBAPIError, match="answers"):
        JobStore(database)
    after = {table: inspect(engine).get_columns(table) for table in inspect(engine).get_table_names()}
    assert {table: [column["name"] for column in columns] for table, columns in after.items()} == {
        table: [column["name"] for column in columns] for table, columns in before.items()
    }
    write(engine, "drop table answers")
    JobStore(database).close()
    assert version_of(engine) == VERSIONS[-1]


@pytest.mark.slow
@pytest.mark.parametrize("mark", ["9999", None], ids=["later", "between releases"])
def test_a_version_that_is_not_known_is_refused_and_left_as_it_is(
    engine: Engine, database: str, mark: str | None
) -> None:
    if mark:
        migrate(engine, VERSIONS[-1])
        write(engine, "update chainfed_version set version_num = :mark", mark=mark)
    else:
        first_version(engine)
        write(engine, "update schema set version = 2")
    before = inspect(engine).get_table_names()
    with pytest.raises(InvalidSetting, match=rf"from 0001 to {VERSIONS[-1]}; this one has .*, of another chainfed-ray"):
        JobStore(database)
    assert inspect(engine).get_table_names() == before
