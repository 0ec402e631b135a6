"""``chainfed artifacts``: lists and downloads what a job has left."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from chainfed_ray.activity import Reporter
from chainfed_ray.api.operator.answers import Json, answer
from chainfed_ray.api.report.activity_display import ActivityDisplay
from chainfed_ray.api.sdk import calls, exchanges
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.api.sdk.keys import read_key
from chainfed_ray.api.transfer.options import ADDRESS, Address, JobId, KeyFile
from chainfed_ray.errors import ArtifactNotFound
from chainfed_ray.units import format_bytes

_progress = Console(stderr=True, highlight=False, markup=False)


def artifacts(
    job: JobId,
    name: Annotated[
        str | None, typer.Argument(help="a file of the list, or a folder such as `model`; without it, lists them")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="the file or folder to write; by default as it is called")] = None,
    address: Address = ADDRESS,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """List what a job has left, or download one of it: the model with its card, plots, the report, the partition."""
    client = Client(address, read_key(key_file))
    found = client.json(calls.list_artifacts(job))["artifacts"]
    if name is None:
        table = Table("name", "bytes", Column("sha256", overflow="fold"), box=None, header_style="bold")
        for one in found:
            table.add_row(one["name"], format_bytes(one["bytes"]), one["sha256"])
        answer(as_json, {"artifacts": found}, table if found else f"Job {job} has left nothing yet.")
        return
    out = output or Path(Path(name).name)
    wanted = _wanted(found, name, out)
    if not wanted:
        raise ArtifactNotFound(job, name)
    with ActivityDisplay(_progress) as listen:
        for one, path in wanted:
            Reporter(f"receiving {one['name']} ({format_bytes(one['bytes'])})", listen).begin()
            client.finish_json(exchanges.download(job, one["name"], one["sha256"], path))
    written = {"status": "written", "output": str(out), "artifacts": [one for one, _ in wanted]}
    answer(as_json, written, f"{name} is in {out}.")


def _wanted(found: list[dict[str, Any]], name: str, out: Path) -> list[tuple[dict[str, Any], Path]]:
    """The files that ``name`` means, and where each goes."""
    for one in found:
        if one["name"] == name:
            return [(one, out)]
    folder = f"{name.rstrip('/')}/"
    inside = [one for one in found if one["name"].startswith(folder)]
    # A name of the service's is not followed out of the folder.
    return [(one, out / Path(one["name"].removeprefix(folder)).name) for one in inside]
