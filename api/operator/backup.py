"""Copies of all that a service keeps: its database, and then the files that the database names, in one folder.

The service may run meanwhile. The database is copied first, so what it names is there when files are copied, unless somebody
deletes it in between; what comes later is left out or does no harm. Files come back first, so a restored service never names a
file that is missing. A copy of a folder can be restored to an object store, and the other way round. ::

    backup.json                when it was made, and the size and SHA-256 of each file; written last
    database.db                the copy of an SQLite database; or database.dump, what pg_dump writes of PostgreSQL's
    jobs/<job>/                a job's commits and stacks, and the secret of its noise while it runs
    uploads/<tenant>/<sha256>  the bytes of complete uploads
"""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, delete, make_url, select
from sqlalchemy.engine import URL

from chainfed_ray.api.operator.kept import Kept, Returned, contents
from chainfed_ray.api.operator.postgresql import put_back, run_program
from chainfed_ray.cluster.database import open_database
from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.snapshots import Digests, Snapshots, files_below
from chainfed_ray.cluster.objects.working_copy import WorkingCopy
from chainfed_ray.cluster.schema import LOCK, VERSIONS, dropping, open_tables, version_of
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.tables import JobRow, SiteOrderRow, UploadRow, moment
from chainfed_ray.errors import CorruptCommit, InvalidSetting

_VERSION = 1
_INDEX, _SQLITE, _DUMP = "backup.json", "database.db", "database.dump"
_TRIES = 10  # until a job that trains was copied between two rounds
_LEFT_OUT = frozenset({"in-use", "sites"})  # of a job's folder: orders of sites are given again


@dataclass(frozen=True)
class Backup:
    """A copy: when it was made, of how many jobs, uploads and bytes, and what was ``missing``: deleted while it was made."""

    made_at: str
    jobs: int
    uploads: int
    bytes: int
    missing: tuple[str, ...]


def back_up(storage: Storage, folder: Path) -> Backup:
    """Copy the database and the files of ``storage`` into ``folder``, which is new or empty. The service may run.

    Raises:
        CorruptCommit: a job or an upload is damaged, or a job changes faster than it can be copied.
        InvalidSetting: the folder is not empty, there is no database, or its programs are not installed.
        DBAPIError: the database does not answer.
        OSError: a disk or the object store is full or away.
    """
    if _version(storage) is None:
        shown = make_url(storage.database).render_as_string()  # without the password
        raise InvalidSetting("CHAINFED_DATABASE", shown, "a database that is there, with the tables of a service")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InvalidSetting("FOLDER", str(folder), "a folder that is new, or empty")
    folder.chmod(0o700)  # it has secrets
    made_at = moment()
    _copy_database(storage, folder)
    with _opened(storage) as engine, engine.connect() as connection:
        jobs = connection.execute(select(JobRow.id, JobRow.status)).all()
        complete = select(UploadRow.tenant, UploadRow.sha256).where(UploadRow.complete.is_(True))
        uploads = connection.execute(complete.distinct()).all()
    missing = []
    for job, status in jobs:
        _copy_job(storage, job, folder / "jobs" / job)
        if status == "succeeded" and not (folder / "jobs" / job / "model").is_dir():
            missing.append(f"job {job}")
    for tenant, digest in uploads:
        try:
            _copy_upload(storage, tenant, digest, folder / "uploads" / tenant / digest)
        except FileNotFoundError:
            missing.append(f"upload {digest} of {tenant}")
    digests = Digests()
    files = {name: asdict(digests.of(path)) for name, path in files_below(folder, frozenset())}
    made = Backup(made_at, len(jobs), len(uploads), sum(file["bytes"] for file in files.values()), tuple(missing))
    text = json.dumps({"version": _VERSION, **asdict(made), "files": files}, indent=1)
    (folder / _INDEX).write_text(text)
    return made


def restore(storage: Storage, folder: Path, replace: bool = False) -> tuple[Backup, Returned]:
    """Make ``storage`` what was copied into ``folder``, but for keys that were revoked since. No service may run.

    A storage that has anything already is not touched unless what it has is to be ``replaced``. What a restore that was cut
    short has left is replaced by another one.

    Raises:
        CorruptCommit: the copy is not what was written.
        InvalidSetting: it is no copy, is of another kind of database, the database is of later code, or the storage has
            jobs, keys, uploads or entries of the audit log.
        DBAPIError: the database does not answer.
        OSError: a disk or the object store is full or away.
    """
    index = _checked(folder)
    url, dump = make_url(storage.database), folder / _SQLITE
    kind = "sqlite" if dump.exists() else "postgresql"
    if url.get_backend_name() != kind:
        raise InvalidSetting("CHAINFED_DATABASE", url.render_as_string(), f"a database of {kind}, as in the copy")
    if kind == "postgresql":
        _check_postgresql(storage, url, folder)
    before, found, kept = _present(storage, index["made_at"])
    if found and not replace:
        shown = ", ".join(f"{count} {words}" for words, count in found.items())
        raise InvalidSetting(
            "CHAINFED_STORAGE", storage.shown_place, f"one with nothing in it; this has {shown} (see --replace)"
        )
    kept.store(storage.root)
    copied = [path.name for path in (folder / "jobs").glob("*")]
    for job in {*before, *copied}:
        storage.remove(job)
    for job in copied:
        _put_job(storage, job, folder / "jobs" / job)
    if replace:
        _remove_uploads(storage)
    for path in (folder / "uploads").glob("*/*"):
        _put_upload(storage, path.parent.name, path)
    _put_database(url, folder, kept)
    open_tables(storage.database, existing=True).dispose()  # a copy of an earlier version is brought forward
    with _opened(storage) as engine, engine.begin() as connection:
        connection.execute(delete(SiteOrderRow))  # their tensors are not in a copy; a job gives its orders again
        returned = kept.put_back(connection, index["made_at"])
    kept.forget(storage.root)
    made = Backup(index["made_at"], index["jobs"], index["uploads"], index["bytes"], tuple(index["missing"]))
    return made, returned


def _copy_job(storage: Storage, job: str, place: Path) -> None:
    for _ in range(_TRIES):
        if _is_fetched(storage.objects, job, place) if storage.objects else _is_copied(storage.job(job), place):
            return
        shutil.rmtree(place, ignore_errors=True)
    raise CorruptCommit(f"job {job}", "it changes faster than it can be copied; pause the job meanwhile")


def _is_fetched(objects: ObjectStore, job: str, place: Path) -> bool:
    """Fetch a job's newest commit. False if those that there were are deleted by now, since newer ones have come.

    Raises:
        CorruptCommit: no commit can be used, and no newer one has come.
    """
    before = Snapshots(objects, job).numbers()
    try:
        WorkingCopy(objects, job, place).begin()
    except CorruptCommit:
        if Snapshots(objects, job).numbers() == before:
            raise
        return False
    return True


def _is_copied(folder: Path, place: Path) -> bool:
    """Copy a job's folder. False if rounds were committed so fast that the copy has none that a job could go on from."""
    # Tensors first: a record that is copied later has its own, or that of a round before it.
    found = sorted(files_below(folder, _LEFT_OUT), key=lambda one: not one[0].endswith(".safetensors"))
    for name, path in found:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # a job that trains replaces its stacks
            shutil.copy2(path, place / name)
    rounds = place / "rounds"
    records = sorted(rounds.glob("*.json"))
    newest = max((path.stem for path in rounds.glob("*.safetensors")), default="")
    for path in records:
        if path.stem > newest:  # it was committed while this was copied
            path.unlink()
            (place / "finished.json").unlink(missing_ok=True)
    kept = [path for path in records if path.exists()]
    return not records or bool(kept and kept[-1].with_suffix(".safetensors").exists())


def _put_job(storage: Storage, job: str, copied: Path) -> None:
    place = storage.job(job)
    shutil.copytree(copied, place)
    if storage.objects:
        copy = WorkingCopy(storage.objects, job, place)
        copy.commit()
        storage.clear_scratch(job)


def _copy_upload(storage: Storage, tenant: str, digest: str, place: Path) -> None:
    """Copy an upload, as a whole or not at all.

    Raises:
        FileNotFoundError: it is deleted.
        CorruptCommit: it is damaged.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{digest}.partial")
    try:
        if storage.objects:
            with partial.open("wb") as file:
                file.writelines(storage.objects.parts(f"uploads/{tenant}/{digest}"))
        else:
            shutil.copy2(storage.uploads(tenant) / digest, partial)
        if Digests().of(partial).sha256 != digest:
            raise CorruptCommit(f"upload {digest} of {tenant}", "its bytes are not those that were sent")
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def _remove_uploads(storage: Storage) -> None:
    if storage.objects:
        storage.objects.delete_below("uploads")
    elif (folder := storage.root / "uploads").is_dir():
        shutil.rmtree(folder)


def _put_upload(storage: Storage, tenant: str, copied: Path) -> None:
    if storage.objects:
        storage.objects.put(f"uploads/{tenant}/{copied.name}", copied)
    else:
        storage.uploads(tenant).mkdir(parents=True, exist_ok=True)
        shutil.copy2(copied, storage.uploads(tenant) / copied.name)


def _copy_database(storage: Storage, folder: Path) -> None:
    url = make_url(storage.database)
    if url.get_backend_name() == "sqlite":
        place = folder / _SQLITE
        place.touch(mode=0o600)
        with _opened(storage) as engine, engine.connect() as connection, closing(sqlite3.connect(place)) as copy:
            source: Any = connection.connection.driver_connection
            try:
                source.backup(copy)
            except sqlite3.Error as error:
                expected = f"a database that can be copied ({error})"
                raise InvalidSetting("CHAINFED_DATABASE", url.render_as_string(), expected) from None
    else:
        (folder / _DUMP).touch(mode=0o600)
        run_program("pg_dump", "--format=custom", "--no-owner", f"--file={folder / _DUMP}", url=url)


def _check_postgresql(storage: Storage, url: URL, folder: Path) -> None:
    """See that the database can be restored, before anything is changed: the programs are there, and all tables are known.

    Raises:
        InvalidSetting: it cannot.
    """
    run_program("pg_restore", "--list", str(folder / _DUMP), url=url)
    run_program("psql", "--no-psqlrc", "--command=select 1", url=url)
    found = _version(storage)
    if found is not None and found not in VERSIONS:  # it may have tables that nobody here knows to delete
        expected = f"an empty database, or one of version {VERSIONS[-1]} or before; this one has {found}"
        raise InvalidSetting("CHAINFED_DATABASE", url.render_as_string(), expected)


def _put_database(url: URL, folder: Path, kept: Kept) -> None:
    """Put the database back, in one step with the revocations that were ``kept``: or a cut would leave those keys valid.

    A step that fails, or is cut, leaves the database that was there.
    """
    if url.get_backend_name() == "sqlite":
        place = Path(str(url.database))
        partial = place.with_name(f"{place.name}.restored")
        partial.unlink(missing_ok=True)  # of a restore that was cut short
        _unlink_journals(partial)  # or SQLite would replay it into this copy
        partial.touch(mode=0o600)
        shutil.copyfile(folder / _SQLITE, partial)
        try:
            with closing(sqlite3.connect(partial)) as copy:
                # Without a log beside it, all of it is in the one file that takes the other's place.
                copy.execute("pragma journal_mode = delete")
                if copy.execute("select 1 from sqlite_master where name = 'keys'").fetchone():
                    copy.executescript("\n".join(kept.revocations()))
        except sqlite3.Error as error:
            expected = f"a copy in which keys can be revoked ({error})"
            raise InvalidSetting("FOLDER", str(folder), expected) from None
        _unlink_journals(place)  # of the database that was there
        partial.replace(place)
    else:
        # pg_restore leaves tables that a later version has and the copy has not.
        first = ";\n".join([f"select pg_advisory_xact_lock({LOCK})", *dropping(), ""])
        statements = "\n".join(["if to_regclass('keys') is not null then", *kept.revocations(), "end if;"])
        last = f"reset search_path;\ndo $revoke$ begin\n{statements}\nend $revoke$;\n"
        put_back(folder / _DUMP, url, first, last)


def _unlink_journals(database: Path) -> None:
    for journal in ("-wal", "-shm", "-journal"):
        database.with_name(database.name + journal).unlink(missing_ok=True)


def _checked(folder: Path) -> dict[str, Any]:
    """The index of the copy in ``folder``, each file of which is what was written."""
    try:
        index: dict[str, Any] = json.loads((folder / _INDEX).read_bytes())
        version = index["version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidSetting(
            "FOLDER", str(folder), f"a folder that `chainfed backup` wrote, with its {_INDEX}"
        ) from None
    if version != _VERSION:
        raise InvalidSetting("FOLDER", str(folder), f"a copy of version {_VERSION}; it has version {version}")
    digests = Digests()
    for name, file in index["files"].items():
        try:
            found = asdict(digests.of(folder / name))
        except FileNotFoundError:
            raise CorruptCommit(str(folder / name), "missing") from None
        if found != file:
            raise CorruptCommit(str(folder / name), "its bytes are not what was written")
    return index


def _version(storage: Storage) -> str | None:
    """The version of the tables of a storage's database; None if it has none, or is not there."""
    url = make_url(storage.database)
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        return None
    with _opened(storage) as engine:
        return version_of(engine)


def _present(storage: Storage, since: str) -> tuple[list[str], dict[str, int], Kept]:
    """The jobs that a storage has, what else, and what of it outlives a restore; nothing if it has no database yet."""
    if _version(storage) is None:
        return [], {}, Kept()
    with _opened(storage) as engine, engine.connect() as connection:
        jobs = list(connection.scalars(select(JobRow.id)))
        return jobs, contents(connection), Kept.of(connection, since)


@contextmanager
def _opened(storage: Storage) -> Iterator[Engine]:
    engine = open_database(storage.database, existing=True)
    try:
        yield engine
    finally:
        engine.dispose()
