"""``chainfed backup`` and ``chainfed restore``: all that a service keeps, copied into a folder, and back."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chainfed_ray.api.operator.acts import put_down
from chainfed_ray.api.operator.answers import Json, answer
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.errors import InvalidSetting, StorageInUse
from chainfed_ray.units import format_bytes

if TYPE_CHECKING:  # other commands start sooner without SQLAlchemy
    from chainfed_ray.api.operator.backup import Backup

Folder = Annotated[Path, typer.Argument(help="the folder of the copy")]


def backup(folder: Folder, as_json: Json = False) -> None:
    """Copy the database, jobs, models and uploads of a service into a new folder. The service may run meanwhile."""
    from chainfed_ray.api.operator.backup import back_up

    storage = Settings.from_environment(existing=True).storage
    with _answering(storage):
        made = back_up(storage, folder)
        put_down("chainfed backup", str(folder.resolve()), storage.database)
    words = f"{made.jobs} jobs and {made.uploads} uploads, {format_bytes(made.bytes)}, are copied to {folder}."
    lost = [f"Deleted meanwhile, and not in the copy: {', '.join(made.missing)}."] if made.missing else []
    answer(as_json, _document(made), words, *lost)


def restore(
    folder: Folder,
    replace: Annotated[bool, typer.Option("--replace", help="delete what the storage has now")] = False,
    as_json: Json = False,
) -> None:
    """Make the storage and the database what was copied into a folder. Stop every process of the service before."""
    from chainfed_ray.api.operator import backup as copies

    storage = Settings.from_environment().storage
    with _alone(storage), _answering(storage):
        made, returned = copies.restore(storage, folder, replace)
        put_down("chainfed restore", f"{folder.resolve()}, of {made.made_at}", storage.database)
    document = _document(made) | {
        "keys_back": returned.back,
        "keys_revoked": returned.revoked,
        "keys_lost": returned.lost,
        "audit_entries_kept": returned.entries,
    }
    words = [f"{made.jobs} jobs and {made.uploads} uploads are as they were at {made.made_at}."]
    if returned.back:
        words.append(f"Valid again are the keys {', '.join(returned.back)}: revoke those that should have ended since.")
    if returned.revoked:
        words.append(f"The keys {', '.join(returned.revoked)} were revoked since, and stay so.")
    if returned.lost:
        words.append(f"The keys {', '.join(returned.lost)} are not in the copy, and are valid no more.")
    if returned.entries:
        words.append(f"{returned.entries} newer entries of the audit log are kept.")
    answer(as_json, document, *words)


def _document(made: "Backup") -> dict[str, object]:
    document: dict[str, object] = dict(vars(made))
    return document | {"missing": list(made.missing)}


@contextmanager
def _answering(storage: Storage) -> Iterator[None]:
    from sqlalchemy.exc import DBAPIError

    try:
        yield
    except DBAPIError as error:
        where = storage.database.rpartition("@")[2]  # without the password
        raise InvalidSetting("CHAINFED_DATABASE", where, f"a database that answers ({error.orig})") from None


@contextmanager
def _alone(storage: Storage) -> Iterator[None]:
    """Hold the lock of ``chainfed serve``, so that no service begins on this machine meanwhile."""
    with (storage.root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageInUse(str(storage.root)) from None
        yield
