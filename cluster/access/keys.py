"""API keys: who may ask the service for what.

A key is a text such as ``cfr_5d1c…_9f80…``: an id, which is no secret and finds the key in the database, and a random secret of
256 bits. The database has only the SHA-256 of the secret. A slow hash, as for passwords, would gain nothing: passwords are few
enough to be tried one after the other, and 256 random bits are not. It would cost each request its time.
"""

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from hmac import compare_digest
from secrets import token_hex
from typing import Any, cast

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from chainfed_ray.cluster.access.identity import SCOPES, Identity, Scope
from chainfed_ray.cluster.schema import open_tables
from chainfed_ray.cluster.tables import KeyRow, moment
from chainfed_ray.cluster.tenants import DEFAULT_TENANT
from chainfed_ray.errors import InvalidSetting, KeyNotFound

_ID_BYTES, _SECRET_BYTES = 8, 32
_ID = re.compile(rf"[0-9a-f]{{{2 * _ID_BYTES}}}")
_TOKEN = re.compile(rf"cfr_({_ID.pattern})_([0-9a-f]{{{2 * _SECRET_BYTES}}})")
_OWNER = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NAME = re.compile(r"[^\x00-\x1f\x7f]{0,100}")
_LATEST = datetime(9999, 1, 1, tzinfo=UTC)
_RATES = range(1, 1_000_001)  # requests a minute


@dataclass(frozen=True)
class Key:
    """A key in the database. Times are ISO 8601 in UTC; ``used_at`` is exact to the hour, and None before the first use."""

    id: str
    owner: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    used_at: str | None
    hash: str = field(repr=False)
    requests_per_minute: int | None = None

    @property
    def identity(self) -> Identity:
        """Who sends a request with this key."""
        return Identity(self.id, self.owner, self.name, frozenset(self.scopes), self.requests_per_minute)

    def document(self) -> dict[str, Any]:
        """The key as JSON, without the hash of its secret."""
        found = asdict(self)
        del found["hash"]
        return {**found, "scopes": list(self.scopes)}

    def is_of(self, secret: str) -> bool:
        """Whether ``secret`` is this key's. The time it takes says nothing about how much of it is right."""
        return compare_digest(self.hash, _hash(secret))

    def is_valid(self) -> bool:
        """Whether the key is neither revoked nor expired now."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > moment())


@dataclass(frozen=True)
class NewKey:
    """A key, with the ``token`` that its owner sends. It is known here and now alone."""

    key: Key
    token: str


def parts_of(token: str) -> tuple[str, str] | None:
    """The id and the secret of a token. None if it does not have the form of one."""
    match = _TOKEN.fullmatch(token)
    return (match[1], match[2]) if match else None


class KeyStore:
    """The keys in the database of jobs at ``url``; safe to use from several threads and processes.

    Raises:
        InvalidSetting: as ``open_tables``.
    """

    def __init__(self, url: str, existing: bool = False) -> None:
        self._engine = open_tables(url, existing)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def make_key(
        self,
        owner: str,
        scopes: Collection[str],
        name: str = "",
        expires_in: timedelta | None = None,
        requests_per_minute: int | None = None,
    ) -> NewKey:
        """Make a key of ``owner`` that allows ``scopes``, ends after ``expires_in``, and may send so many requests a minute.

        Raises:
            InvalidSetting: the owner, a scope, the name, the time or the number is not valid.
        """
        _check(owner, scopes, name, expires_in)
        if requests_per_minute is not None and (requests_per_minute not in _RATES or "site" in scopes):
            expected = f"1 to {_RATES[-1]}, and none for a site: how much a site sends follows from its orders"
            raise InvalidSetting("requests-per-minute", str(requests_per_minute), expected)
        now, secret = datetime.now(UTC), token_hex(_SECRET_BYTES)
        row = KeyRow(
            id=token_hex(_ID_BYTES),
            hash=_hash(secret),
            owner=owner,
            name=name,
            scopes=[scope for scope in SCOPES if scope in scopes],
            created_at=moment(now),
            expires_at=None if expires_in is None else moment(now + min(expires_in, _LATEST - now)),
            requests_per_minute=requests_per_minute,
        )
        with Session(self._engine) as session, session.begin():
            session.add(row)
            session.flush()
            return NewKey(_key(row), f"cfr_{row.id}_{secret}")

    def make_site_key(self, site: str, owner: str = DEFAULT_TENANT, expires_in: timedelta | None = None) -> NewKey:
        """Make a key for the site called ``site``. A site may have several, so that one can take another's place.

        Raises:
            InvalidSetting: a name or the time is not valid.
        """
        if not _OWNER.fullmatch(site):
            raise InvalidSetting("site", site, _expected_name())
        return self.make_key(owner, ["site"], site, expires_in)

    def keys(self, owner: str | None = None, scope: Scope | None = None, name: str | None = None) -> list[Key]:
        """Every key, also one that is revoked or has expired, the oldest first; or those of an owner, a scope and a name."""
        query = select(KeyRow).order_by(KeyRow.created_at, KeyRow.id)
        if owner is not None:
            query = query.where(KeyRow.owner == owner)
        if name is not None:
            query = query.where(KeyRow.name == name)
        with Session(self._engine) as session:
            found = [_key(row) for row in session.scalars(query)]
        return [key for key in found if scope is None or scope in key.scopes]

    def state(self) -> tuple[int, int]:
        """How many keys there are, and how many of them are revoked. No key is deleted, and none is valid again.

        So keys that were read once need to be read again only if this has changed.
        """
        query = select(func.count(), func.count(KeyRow.revoked_at)).select_from(KeyRow)
        with Session(self._engine) as session:
            count, revoked = session.execute(query).one()
            return count, revoked

    def revoke(self, key: str) -> Key:
        """Revoke the key with the id ``key``. A service stops to accept it within seconds (see ``KeyRing``).

        Raises:
            KeyNotFound: there is no such key.
        """
        if not _ID.fullmatch(key):
            raise KeyNotFound(key)
        with Session(self._engine) as session, session.begin():
            session.execute(
                update(KeyRow).where(KeyRow.id == key, KeyRow.revoked_at.is_(None)).values(revoked_at=moment())
            )
            row = session.get(KeyRow, key)
            if row is None:
                raise KeyNotFound(key)
            return _key(row)

    def authenticate(self, token: str) -> Identity | None:
        """Who sends ``token``, as the database says now. None unless it is a key's that is valid."""
        if (parts := parts_of(token)) is None:
            return None
        with Session(self._engine) as session:
            row = session.get(KeyRow, parts[0])
            key = _key(row) if row else None
        return key.identity if key and key.is_of(parts[1]) and key.is_valid() else None

    def note_use(self, key: str) -> None:
        """Put on record that a key is used now."""
        with Session(self._engine) as session, session.begin():
            session.execute(update(KeyRow).where(KeyRow.id == key).values(used_at=this_hour()))


def _check(owner: str, scopes: Collection[str], name: str, expires_in: timedelta | None) -> None:
    if not _OWNER.fullmatch(owner):
        raise InvalidSetting("owner", owner, _expected_name())
    if not scopes or not set(scopes) <= set(SCOPES):
        raise InvalidSetting("scopes", ",".join(scopes), f"some of {', '.join(SCOPES)}, with commas between them")
    if "site" in scopes and (len(set(scopes)) > 1 or not _OWNER.fullmatch(name)):
        raise InvalidSetting("scopes", ",".join(scopes), "site alone, with the site's name as the name of the key")
    if not _NAME.fullmatch(name):
        raise InvalidSetting("name", name, "at most 100 characters, without line breaks")
    if expires_in is not None and expires_in <= timedelta(0):
        raise InvalidSetting("expires", str(expires_in), "a time that is not over, such as 90d")


def _expected_name() -> str:
    return "1 to 63 lower-case letters, digits and hyphens, which begin and end with a letter or a digit"


def this_hour() -> str:
    """As exactly as the time of a key's last use is kept. A finer one would be written at each request."""
    return moment(datetime.now(UTC).replace(minute=0, second=0, microsecond=0))


def _hash(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


def _key(row: KeyRow) -> Key:
    return Key(
        id=row.id,
        owner=row.owner,
        name=row.name,
        scopes=cast("tuple[Scope, ...]", tuple(row.scopes)),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        used_at=row.used_at,
        hash=row.hash,
        requests_per_minute=row.requests_per_minute,
    )
