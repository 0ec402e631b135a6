"""``chainfed sites``: makes keys for sites, lists the sites, and revokes their keys."""

from contextlib import closing
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from chainfed_ray.api.operator.acts import put_down
from chainfed_ray.api.operator.answers import Json, answer
from chainfed_ray.api.operator.keys_command import key_store, period_of
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.cluster.tenants import DEFAULT_TENANT

sites_app = typer.Typer(
    no_args_is_help=True,
    help="Let sites join: machines that keep their rows. The database is that of CHAINFED_STORAGE or CHAINFED_DATABASE.",
)
Site = Annotated[str, typer.Argument(help="the name of the site, by which jobs name it")]


@sites_app.command()
def add(
    site: Site,
    owner: Annotated[str, typer.Option(help="the tenant whose jobs may name the site")] = DEFAULT_TENANT,
    expires: Annotated[str, typer.Option(help="when its key ends: 90d, 12h or never")] = "365d",
    as_json: Json = False,
) -> None:
    """Make a key for a site, and print it once. A site may have several, so that one can take another's place."""
    period = period_of(expires)
    with key_store(makes=True) as store:
        made = store.make_site_key(site, owner, period)
    put_down("chainfed sites add", f"{made.key.id} of {owner}: site {site}")
    answer(
        as_json,
        {"site": site, "key": made.key.id, "expires_at": made.key.expires_at, "token": made.token},
        f"Site {site} joins with this key. It is shown once:",
        made.token,
    )


@sites_app.command("list")
def list_sites(as_json: Json = False) -> None:
    """List the sites: their valid keys, whether a process of each is there, and when it was last heard."""
    from chainfed_ray.cluster.sites.mailbox import Mailbox, site_address

    with key_store() as store:
        keys = store.keys(scope="site")
    with closing(Mailbox(Settings.from_environment().storage)) as mailbox:
        known = {state.name: state for state in mailbox.sites()}
    sites: list[dict[str, Any]] = []
    addresses = {site_address(key.owner, key.name) for key in keys}
    for name in sorted(addresses | known.keys()):
        valid = [key.id for key in keys if site_address(key.owner, key.name) == name and key.is_valid()]
        state = known.get(name)
        seen = datetime.fromtimestamp(state.seen_at, UTC).isoformat(timespec="seconds") if state else None
        sites.append(
            {
                "site": name,
                "keys": valid,
                "joined": bool(state and state.joined),
                "seen_at": seen,
                "version": state.version if state else None,
            }
        )
    table = Table(Column("site", no_wrap=True), "joined", "last heard (UTC)", "version", "valid keys", box=None)
    for site in sites:
        seen_at = (site["seen_at"] or "never")[:16].replace("T", " ")
        joined = "yes" if site["joined"] else "no"
        table.add_row(site["site"], joined, seen_at, site["version"] or "", ", ".join(site["keys"]) or "none")
    none = "There are no sites; `chainfed sites add hospital-a` makes a key for one."
    answer(as_json, {"sites": sites}, table if sites else none)


@sites_app.command()
def revoke(
    site: Site,
    owner: Annotated[str, typer.Option(help="the tenant whose site it is")] = DEFAULT_TENANT,
    as_json: Json = False,
) -> None:
    """Revoke every key of a site. A service that runs stops to accept them within seconds."""
    with key_store() as store:
        revoked = [store.revoke(key.id).id for key in store.keys(owner, "site", site) if key.is_valid()]
    for key in revoked:
        put_down("chainfed sites revoke", f"{key} of {owner}: site {site}")
    answer(as_json, {"site": site, "revoked": revoked}, f"Site {site}: {len(revoked)} keys revoked.")
