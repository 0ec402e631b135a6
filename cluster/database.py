"""The door to the database of jobs: connections that notice when what they are connected to is no longer there."""

import sqlite3
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DisconnectionError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    TimeoutError,
)

from chainfed_ray.errors import InvalidSetting

PATIENCE_SECONDS = 30.0  # until what does not answer, or is locked, is taken for away
CONNECT_SECONDS = 10
_BETWEEN_TRIES_SECONDS = 0.01
NO_ANSWER = (OperationalError, InterfaceError, TimeoutError)
"""What is raised if the database does not answer: wait, and ask again."""


def is_in_doubt(error: Exception) -> bool:
    """Whether what was asked may be done although the database did not answer: the connection was lost in a commit."""
    return getattr(getattr(error, "orig", None), "is_in_doubt", False)


def open_database(url: str, existing: bool) -> Engine:
    """An engine for the database at ``url``. The file of SQLite is made unless it must be an ``existing`` one.

    Raises:
        InvalidSetting: ``url`` is not an SQLAlchemy URL, or its driver is not installed.
    """
    try:
        parsed = make_url(url)
        file = _sqlite_file(parsed)
        engine = create_engine(_of_existing(parsed) if file else parsed, pool_pre_ping=True)
        if parsed.drivername == "postgresql+psycopg":
            event.listen(engine, "do_connect", _connect_to_postgresql)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, ValueError) as error:  # ValueError: of the port
        shown = url.rpartition("@")[2]  # the part before may contain a password
        raise InvalidSetting(
            "CHAINFED_DATABASE", shown, f"an SQLAlchemy URL with its driver installed ({error})"
        ) from None
    if file:
        if not existing:
            with suppress(OSError):  # the first connection says what is wrong
                file.touch(mode=0o600)
        event.listen(engine, "connect", lambda connection, record: _connected(connection, record, file))
        event.listen(engine, "checkout", lambda _, record, __: _check_inode(file, record))
    return engine


def _sqlite_file(url: URL) -> Path | None:
    """The file of an SQLite database; None for one in memory, and for other databases."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:") or "uri" in url.query:
        return None
    return Path(str(url.database))


def _of_existing(url: URL) -> URL:
    """The same SQLite database, for connections that do not make its file."""
    return url.set(database=f"file:{quote(url.database or '')}", query={**url.query, "mode": "rw", "uri": "true"})


def _connected(connection: Any, record: Any, file: Path) -> None:
    """Set SQLite up so that readers do not wait for a writer, writers wait for each other, and commits survive power loss."""
    connection.execute(f"pragma busy_timeout = {1000 * PATIENCE_SECONDS:.0f}")
    _use_write_ahead_log(connection)
    connection.execute("pragma synchronous = full")
    connection.execute("pragma foreign_keys = on")
    record.info["inode"] = _inode(file)


def _use_write_ahead_log(connection: Any) -> None:
    """Turn SQLite's write-ahead log on. While another process does the same, SQLite answers "locked" at once: ask again."""
    ends = monotonic() + PATIENCE_SECONDS
    while True:
        try:
            connection.execute("pragma journal_mode = wal")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or monotonic() > ends:
                raise
            sleep(_BETWEEN_TRIES_SECONDS)


def _connect_to_postgresql(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> Any:
    return _patient_connection().connect(*arguments, **{"connect_timeout": CONNECT_SECONDS} | options)


@contextmanager
def unhurried(connection: Connection) -> Iterator[None]:
    """Let what is asked through a connection take any time, for a block."""
    driver: Any = connection.connection.driver_connection
    is_patient = hasattr(driver, "waits_for_ever")
    if is_patient:
        driver.waits_for_ever = True
    try:
        yield
    finally:
        if is_patient:
            driver.waits_for_ever = False


@cache
def _patient_connection() -> Any:
    """The class of connections to PostgreSQL. It is made here, since psycopg is an optional package."""
    import psycopg

    class CommitLost(psycopg.OperationalError):
        is_in_doubt = True

    class Patient(psycopg.Connection[Any]):
        """A connection that fails if the server says nothing for ``PATIENCE_SECONDS``, unless it ``waits_for_ever``.

        The server itself cannot end such a query, and TCP notices after hours that there is nobody.
        """

        waits_for_ever = False

        def commit(self) -> None:
            try:
                super().commit()
            except psycopg.OperationalError as error:
                if self.closed:  # else the server itself has refused it
                    raise CommitLost(str(error)) from error
                raise

        def wait(self, gen: Any, *arguments: Any, **options: Any) -> Any:
            return super().wait(self._bounded(gen), *arguments, **options)

        def _bounded(self, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
            """The same steps, each of which waits for the server."""
            since = monotonic()
            try:
                wanted = next(steps)
                while True:
                    ready = yield wanted
                    if ready:
                        since = monotonic()
                    elif monotonic() - since > PATIENCE_SECONDS and not self.waits_for_ever:
                        self.close()
                        raise psycopg.OperationalError(f"the server has said nothing for {PATIENCE_SECONDS:g} s")
                    wanted = steps.send(ready)
            except StopIteration as over:
                return over.value

    return Patient


def _check_inode(file: Path, record: Any) -> None:
    """Before a connection is used: its file must still be at its path. What is written into a removed one is lost."""
    inode = record.info["inode"]
    if inode is None or _inode(file) != inode:
        raise DisconnectionError(f"{file} was removed or replaced")


def _inode(file: Path) -> int | None:
    try:
        return file.stat().st_ino
    except OSError:
        return None
