"""``chainfed data``: sends files of rows to a service, lists them and deletes them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from chainfed_ray.api.operator.answers import Json, answer
from chainfed_ray.api.report.activity_display import ActivityDisplay
from chainfed_ray.api.sdk import calls, exchanges
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.api.sdk.keys import read_key
from chainfed_ray.api.transfer.options import ADDRESS, Address, KeyFile
from chainfed_ray.errors import InvalidSetting
from chainfed_ray.units import format_bytes

data_app = typer.Typer(no_args_is_help=True, help="Send files of rows to the service, for jobs to read as upload:<id>.")
_progress = Console(stderr=True, highlight=False, markup=False)

UploadId = Annotated[str, typer.Argument(help="the id of an upload, from `chainfed data list`")]


@data_app.command()
def add(
    file: Annotated[Path, typer.Argument(help="a .csv, .tsv, .jsonl, .json or .parquet file; text may be .gz")],
    name: Annotated[str | None, typer.Option(help="what it is called; by default as the file is")] = None,
    address: Address = ADDRESS,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Send a file. The same command again goes on where it was interrupted, and sends nothing that is there."""
    client = Client(address, read_key(key_file))
    if not file.is_file():
        raise InvalidSetting("FILE", str(file), "a file that can be read")
    with ActivityDisplay(_progress) as listen:
        upload = client.finish_json(exchanges.upload(file, name, listen))
    answer(as_json, upload, f'{upload["name"]} is there. In a job: `data: {{train: "upload:{upload["id"]}"}}`.')


@data_app.command("list")
def list_uploads(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="how many uploads to show, the newest first")] = 20,
    address: Address = ADDRESS,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """List the files that were sent."""
    uploads = Client(address, read_key(key_file)).json(calls.list_uploads(limit))["uploads"]
    columns = ("name", "bytes", "received", "sent (UTC)", "sha256")
    table = Table(Column("upload", no_wrap=True), *columns, box=None, header_style="bold")
    for one in uploads:
        received = "all" if one["complete"] else f"{one['received'] * 100 // one['bytes']} %"
        created = one["created_at"][:16].replace("T", " ")
        table.add_row(one["id"], one["name"], format_bytes(one["bytes"]), received, created, f"{one['sha256'][:12]}…")
    none = "There are no uploads yet; `chainfed data add rows.csv` sends one."
    answer(as_json, {"uploads": uploads}, table if uploads else none)


@data_app.command()
def delete(upload: UploadId, address: Address = ADDRESS, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Delete an upload that no job reads which is queued or running."""
    Client(address, read_key(key_file)).json(calls.delete_upload(upload))
    answer(as_json, {"status": "deleted", "id": upload}, f"Upload {upload} is deleted.")
