"""The door to the database of jobs: connections that notice when what they are connected to is no longer there."""

from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import create_engine, event
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

NO_ANSWER = (OperationalError, InterfaceError, TimeoutError)
"""What is raised if the database does not answer: wait, and ask again."""


def open_database(url: str, existing: bool) -> Engine:
    """An engine for the database at ``url``. The file of SQLite is made unless it must be an ``existing`` one.

    Raises:
        InvalidSetting: ``url`` is not an SQLAlchemy URL, or its driver is not installed.
    """
    try:
        parsed = make_url(url)
        file = _sqlite_file(parsed)
        engine = create_engine(_of_existing(parsed) if file else parsed, pool_pre_ping=True)
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
    for setting in ("journal_mode = wal", "synchronous = full", "busy_timeout = 30000", "foreign_keys = on"):
        connection.execute(f"pragma {setting}")
    record.info["inode"] = _inode(file)


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
