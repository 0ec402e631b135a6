"""What is in a database that a restore replaces, and what outlives it: keys that were revoked, newer entries of the log."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, func, insert, inspect, select, update

from chainfed_ray.cluster.tables import AuditRow, JobRow, KeyRow, UploadRow, moment

_FILE = "kept-by-restore.json"
_COUNTED = ((JobRow, "jobs"), (KeyRow, "keys"), (UploadRow, "uploads"), (AuditRow, "entries of the audit log"))
_ENTRY = [column for column in AuditRow.__table__.columns if column.name != "number"]


def contents(connection: Connection) -> dict[str, int]:
    """What a database has, such as ``{"jobs": 2}``, without what it has none of. One of an earlier version lacks tables."""
    there = set(inspect(connection).get_table_names())
    counts = {
        words: connection.scalar(select(func.count()).select_from(row)) or 0
        for row, words in _COUNTED
        if row.__tablename__ in there
    }
    return {words: count for words, count in counts.items() if count}


@dataclass
class Kept:
    """When each key was ``revoked``; the ``valid`` keys; and entries of the audit log since a backup, each as its columns."""

    revoked: dict[str, str] = field(default_factory=dict)
    valid: list[str] = field(default_factory=list)
    entries: list[list[str | None]] = field(default_factory=list)

    @classmethod
    def of(cls, connection: Connection, since: str) -> Self:
        """What a database has of this. ``since`` is when the backup was begun."""
        there = set(inspect(connection).get_table_names())
        found = cls()
        if KeyRow.__tablename__ in there:
            found.valid = _valid(connection)
            query = select(KeyRow.id, KeyRow.revoked_at).where(KeyRow.revoked_at.is_not(None))
            found.revoked = {key: str(at) for key, at in connection.execute(query)}
        if AuditRow.__tablename__ in there:
            found.entries = _entries(connection, since)
        return found

    def store(self, folder: Path) -> None:
        """Write this into a file of ``folder``, beside what a restore that was cut short has left there: both are kept."""
        place = folder / _FILE
        if place.exists():
            before = Kept(**json.loads(place.read_bytes()))
            self.revoked = before.revoked | self.revoked
            # What is valid now may be what the restore that was cut short has brought back.
            self.valid = sorted({*before.valid} - self.revoked.keys())
            known = set(map(tuple, before.entries))
            self.entries = before.entries + [entry for entry in self.entries if tuple(entry) not in known]
        partial = place.with_suffix(".partial")
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(asdict(self)))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(place)

    def revocations(self) -> list[str]:
        """The SQL statements that revoke in a database what was revoked before."""
        stays = (
            update(KeyRow).where(KeyRow.id == key, KeyRow.revoked_at.is_(None)).values(revoked_at=at)
            for key, at in sorted(self.revoked.items())
        )
        return [f"{statement.compile(compile_kwargs={'literal_binds': True})};" for statement in stays]

    def put_back(self, connection: Connection, since: str) -> "Returned":
        """Add to a database that was restored, with what was revoked before, the entries that it lacks."""
        known = set(connection.scalars(select(KeyRow.id)))
        revoked = sorted(key for key, at in self.revoked.items() if at >= since and key in known)
        restored = set(map(tuple, _entries(connection, since)))
        missing = [entry for entry in self.entries if tuple(entry) not in restored and str(entry[0]) >= since]
        if missing:
            names = [column.name for column in _ENTRY]
            connection.execute(insert(AuditRow), [dict(zip(names, entry, strict=True)) for entry in missing])
        valid = _valid(connection)
        lost = [key for key in self.valid if key not in valid]
        return Returned([key for key in valid if key not in self.valid], revoked, lost, len(missing))

    @staticmethod
    def forget(folder: Path) -> None:
        """Delete the file: the database has everything."""
        (folder / _FILE).unlink(missing_ok=True)


@dataclass(frozen=True)
class Returned:
    """What a restore did to keys and to the audit log.

    ``back`` are keys that are valid now and were not before; those of a lost database may have been revoked since the backup.
    ``revoked`` are in the backup, were revoked since it was begun, and stay so. ``lost`` were valid before, and the backup does
    not have them.
    ``entries`` of the audit log are newer than the backup, and were kept.
    """

    back: list[str]
    revoked: list[str]
    lost: list[str]
    entries: int


def _valid(connection: Connection) -> list[str]:
    query = (
        select(KeyRow.id, KeyRow.expires_at).where(KeyRow.revoked_at.is_(None)).order_by(KeyRow.created_at, KeyRow.id)
    )
    now = moment()
    return [key for key, ends in connection.execute(query) if ends is None or ends > now]


def _entries(connection: Connection, since: str) -> list[list[Any]]:
    query = select(*_ENTRY).where(AuditRow.at >= since).order_by(AuditRow.number)
    return [list(row) for row in connection.execute(query)]
