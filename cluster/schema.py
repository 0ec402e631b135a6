"""Opens the database of jobs, and brings its tables to the version of this code with Alembic (migrations/versions)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from sqlalchemy import Connection, inspect, text
from sqlalchemy.engine import Engine

from chainfed_ray.cluster.database import open_database, unhurried
from chainfed_ray.cluster.tables import TABLES
from chainfed_ray.errors import InvalidSetting

VERSIONS = ("0001", "0002", "0003", "0004", "0005")
"""Every version of the tables, the oldest first. The last one is that of this code."""

_MARK = "chainfed_version"  # the table that has the version
_WITHOUT_MARK = "0001"  # a database from before Alembic marked its version
_MARKED = "0002"  # the first version that Alembic marked
LOCK = 0x636861696E  # PostgreSQL's number of the lock that one process has who changes tables
_ONE_THREAD = Lock()  # Alembic keeps the connection of the steps that it runs in a place that threads share


def open_tables(url: str, existing: bool = False) -> Engine:
    """An engine for the database at ``url``, with the tables of this code's version: they are made, or brought forward.

    The file of SQLite is made as well, unless it must be an ``existing`` one.

    Raises:
        InvalidSetting: ``url`` is not an SQLAlchemy URL, its driver is not installed, or its database has a later version.
    """
    engine = open_database(url, existing)
    try:
        if version_of(engine) != VERSIONS[-1]:
            migrate(engine, VERSIONS[-1])
    except BaseException:
        engine.dispose()
        raise
    return engine


def version_of(engine: Engine) -> str | None:
    """The version of a database's tables; None if it has no tables."""
    with engine.connect() as connection:
        return _version(connection)


def migrate(engine: Engine, version: str) -> None:
    """Bring the tables to ``version``, forward or back, in one transaction. Other processes that want to wait meanwhile.

    Going back deletes what the earlier version has no place for.

    Raises:
        InvalidSetting: the database has a version that this code does not know.
    """
    from alembic import command  # here, since most processes find their tables as they should be
    from alembic.config import Config

    with _ONE_THREAD, _alone(engine) as connection:
        found = _version(connection)
        if found == version and _is_marked(connection):  # another process was faster
            return
        if found is not None and found not in VERSIONS:
            shown = engine.url.render_as_string()  # without the password
            known = f"a database of a version from {VERSIONS[0]} to {VERSIONS[-1]}"
            raise InvalidSetting("CHAINFED_DATABASE", shown, f"{known}; this one has {found}, of another chainfed-ray")
        config = Config()
        folder = Path(__file__).with_name("migrations")
        config.set_main_option("script_location", str(folder).replace("%", "%%"))
        config.attributes |= {"connection": connection, "version_table": _MARK}
        if found == _WITHOUT_MARK and not _is_marked(connection):
            command.stamp(config, found)
        back = found is not None and VERSIONS.index(version) < VERSIONS.index(found)
        (command.downgrade if back else command.upgrade)(config, version)


def dropping() -> list[str]:
    """The SQL statements that delete every table which this code knows, with what is in it. Tables of others stay."""
    names = [*(table.name for table in reversed(TABLES.sorted_tables)), _MARK]
    return [f"drop table if exists {name}" for name in names]


def _is_marked(connection: Connection) -> bool:
    return inspect(connection).has_table(_MARK)


def _version(connection: Connection) -> str | None:
    tables = set(inspect(connection).get_table_names())
    marks: list[str] = []
    if _MARK in tables:
        marks = list(connection.execute(text(f"select version_num from {_MARK}")).scalars())
    elif "schema" in tables and "jobs" in tables:
        marks = [f"{number:04d}" for number in connection.execute(text("select version from schema")).scalars()]
        if marks == [_MARKED]:
            return "a version between releases"
    elif "jobs" in tables:
        return "no version"
    return marks[-1] if marks else None


@contextmanager
def _alone(engine: Engine) -> Iterator[Connection]:
    """A connection in a transaction that no other process has at the same time, and that keeps changes of tables as well."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            driver: Any = connection.connection.driver_connection
            usual, driver.isolation_level = driver.isolation_level, None  # or the driver would commit by itself
            try:
                with connection.begin():
                    connection.exec_driver_sql("begin immediate")
                    yield connection
            finally:
                driver.isolation_level = usual
        else:
            # Another process that changes tables, and a change of large ones, may take any time.
            with unhurried(connection), connection.begin():
                if engine.dialect.name == "postgresql":
                    connection.execute(text("select pg_advisory_xact_lock(:lock)").bindparams(lock=LOCK))
                yield connection
