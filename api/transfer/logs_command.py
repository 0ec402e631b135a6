"""``chainfed logs``: what a job's coordinator and clients did, line by line."""

import sys
from typing import Annotated, Any

import typer

from chainfed_ray.api.operator.answers import Json, answer
from chainfed_ray.api.sdk import exchanges
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.api.sdk.keys import read_key
from chainfed_ray.api.transfer.options import ADDRESS, Address, JobId, KeyFile


def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="go on until the job is over")] = False,
    address: Address = ADDRESS,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Show the log of a job. It has no row of data."""
    lines = Client(address, read_key(key_file)).stream_json(exchanges.logs(job, follow))
    if as_json:
        answer(as_json, {"lines": list(lines)})
        return
    for line in lines:
        print(_shown(line), file=sys.__stdout__, flush=True)


def _shown(line: dict[str, Any]) -> str:
    at = line["at"][:19].replace("T", " ")
    level = "" if line["level"] == "info" else f"{line['level']}: "
    return f"{at}  {line['source']}  {level}{line['message']}"
