"""``chainfed database``: tells the version of the database's tables, and brings them forward or back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from chainfed_ray.api.operator.acts import put_down
from chainfed_ray.api.operator.answers import Json, answer
from chainfed_ray.cluster.storage import database_url
from chainfed_ray.errors import InvalidSetting

if TYPE_CHECKING:  # other commands start sooner without SQLAlchemy
    from sqlalchemy import Engine

database_app = typer.Typer(
    no_args_is_help=True,
    help="Upgrade the database, and go back. The database is that of CHAINFED_STORAGE or CHAINFED_DATABASE.",
)


@database_app.command()
def version(as_json: Json = False) -> None:
    """Tell the version of the tables, and that of this chainfed-ray."""
    from chainfed_ray.cluster.schema import VERSIONS, version_of

    with _database() as engine:
        found = version_of(engine)
    words = "The database has no tables yet" if found is None else f"The database has version {found}"
    answer(as_json, {"database": found, "code": VERSIONS[-1]}, f"{words}; this chainfed-ray has {VERSIONS[-1]}.")


@database_app.command("migrate")
def migrate_tables(
    to: Annotated[str | None, typer.Argument(help="the version; by default that of this chainfed-ray")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="go back without a question")] = False,
    as_json: Json = False,
) -> None:
    """Bring the tables to a version. Stop every process of the service before. What an earlier version lacks is deleted."""
    from chainfed_ray.cluster.schema import VERSIONS, migrate, version_of

    to = to or VERSIONS[-1]
    if to not in VERSIONS:
        raise InvalidSetting("TO", to, f"one of {', '.join(VERSIONS)}")
    with _database() as engine:
        found = version_of(engine)
        if found in VERSIONS and VERSIONS.index(to) < VERSIONS.index(found) and not yes:
            typer.confirm(
                f"This deletes what version {to} has no place for, such as keys and uploads. Go on?", abort=True
            )
        migrate(engine, to)
    if found not in (None, to):  # a new database has nothing that was done to it
        put_down("chainfed database migrate", f"{found} to {to}")
    answer(as_json, {"before": found, "database": to}, f"The database has version {to}.")


@contextmanager
def _database() -> "Iterator[Engine]":
    from sqlalchemy.exc import DBAPIError

    from chainfed_ray.cluster.database import open_database

    engine = open_database(database_url(), existing=True)
    try:
        yield engine
    except DBAPIError as error:
        shown = engine.url.render_as_string()  # without the password
        raise InvalidSetting("CHAINFED_DATABASE", shown, f"a database that answers ({error.orig})") from None
    finally:
        engine.dispose()
