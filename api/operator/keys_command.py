"""``chainfed keys``: makes, lists and revokes API keys in the database of a service, whether it runs or not."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from chainfed_ray.api.operator.acts import put_down
from chainfed_ray.api.operator.answers import Json, answer
from chainfed_ray.cluster.access.identity import SCOPES
from chainfed_ray.cluster.storage import Settings, database_url
from chainfed_ray.cluster.tenants import DEFAULT_TENANT
from chainfed_ray.errors import InvalidSetting

if TYPE_CHECKING:
    from chainfed_ray.cluster.access.keys import Key, KeyStore

keys_app = typer.Typer(
    no_args_is_help=True,
    help="Make, list and revoke API keys, in the database that CHAINFED_STORAGE or CHAINFED_DATABASE names.",
)
_PERIOD = re.compile(r"([0-9]{1,6})\s*([hd])")
_HOURS = {"h": 1, "d": 24}
_NEVER = "never"


@keys_app.command()
def create(
    owner: Annotated[str, typer.Option(help="whose key it is: a tenant, whose jobs and models others do not see")],
    scopes: Annotated[str, typer.Option(help=f"what it allows, with commas: {', '.join(SCOPES)}")],
    expires: Annotated[str, typer.Option(help="when it ends: 90d, 12h or never")] = "365d",
    name: Annotated[str, typer.Option(help="what it is for; of a site's key the site's name")] = "",
    requests_per_minute: Annotated[int | None, typer.Option(help="how many requests it may send in a minute")] = None,
    as_json: Json = False,
) -> None:
    """Make a key, and print it once: the database does not have it."""
    period, wanted = period_of(expires), [scope.strip() for scope in scopes.split(",") if scope.strip()]
    with key_store(makes=True) as store:
        made = store.make_key(owner, wanted, name, period, requests_per_minute)
    put_down("chainfed keys create", f"{made.key.id} of {owner}: {','.join(made.key.scopes)}")
    until = f"until {_shown(made.key.expires_at)} UTC" if made.key.expires_at else "until it is revoked"
    answer(
        as_json,
        {**made.key.document(), "token": made.token},
        f"Key {made.key.id} of {owner} is valid {until}. It is shown once:",
        made.token,
    )


@keys_app.command("list")
def list_keys(
    owner: Annotated[str | None, typer.Option(help="the keys of this owner alone")] = None, as_json: Json = False
) -> None:
    """List the keys, the oldest first, without what is secret of them."""
    with key_store() as store:
        keys = store.keys(owner)
    columns = ("owner", "name", "scopes", "a minute", "expires (UTC)", "last used (UTC)", "state")
    table = Table(Column("key", no_wrap=True), *columns, box=None, header_style="bold")
    for key in keys:
        rate = str(key.requests_per_minute or "")
        times = (_shown(key.expires_at), _shown(key.used_at))
        table.add_row(key.id, key.owner, key.name, ",".join(key.scopes), rate, *times, _state(key))
    none = f"There are no keys; `chainfed keys create --owner {owner or DEFAULT_TENANT} --scopes admin` makes one."
    answer(as_json, {"keys": [key.document() for key in keys]}, table if keys else none)


@keys_app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="the id of a key, from `chainfed keys list`")], as_json: Json = False
) -> None:
    """Revoke a key. A service that runs stops to accept it within seconds."""
    with key_store() as store:
        revoked = store.revoke(key)
    put_down("chainfed keys revoke", f"{key} of {revoked.owner}")
    answer(as_json, revoked.document(), f"Key {key} of {revoked.owner} is revoked.")


@contextmanager
def key_store(makes: bool = False) -> Iterator["KeyStore"]:
    """The keys in the database that the environment names, for a block. It is made if the block ``makes`` a key.

    Raises:
        InvalidSetting: there is no such database, or it does not answer.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import DBAPIError

    from chainfed_ray.cluster.access.keys import KeyStore

    url = Settings.from_environment().storage.database if makes else database_url()
    try:
        store = KeyStore(url, existing=not makes)
        try:
            yield store
        finally:
            store.close()
    except DBAPIError as error:
        shown = make_url(url).render_as_string()  # without the password
        raise InvalidSetting("CHAINFED_DATABASE", shown, f"a database that answers ({error.orig})") from None


def period_of(text: str) -> timedelta | None:
    """How long a key is valid: ``90d``, ``12h``, or None for ``never``."""
    if text == _NEVER:
        return None
    match = _PERIOD.fullmatch(text)
    if match is None:
        raise InvalidSetting("--expires", text, "a number of days or hours such as 90d or 12h, or never")
    return timedelta(hours=int(match[1]) * _HOURS[match[2]])


def _state(key: "Key") -> str:
    if key.revoked_at:
        return "revoked"
    return "valid" if key.is_valid() else "expired"


def _shown(at: str | None) -> str:
    """A time to the minute, for people."""
    return at[:16].replace("T", " ") if at else ""
