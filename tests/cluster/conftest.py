"""The databases that tests of the cluster run on: a file of SQLite, and a PostgreSQL server where one is installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tests import postgres


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    if (programs := postgres.installed()) is None:
        pytest.skip("no PostgreSQL server is installed")
    with postgres.server(programs) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without a table."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    url: str = request.getfixturevalue("empty_postgresql")
    return url


@pytest.fixture
def empty_postgresql(postgresql: str) -> str:
    """The URL of a database of PostgreSQL without a table."""
    engine = create_engine(postgresql)
    with engine.begin() as connection:
        connection.execute(text("drop schema public cascade"))
        connection.execute(text("create schema public"))
    engine.dispose()
    return postgresql
