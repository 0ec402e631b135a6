"""Commands that tell a job of the service what to do: pause, go on, end."""

from pathlib import Path
from typing import Annotated

import typer

from chainfed_ray.api.command.client import ServiceClient, read_key
from chainfed_ray.api.operator.answers import Json, answer

ADDRESS = "http://127.0.0.1:8000"
Address = Annotated[str, typer.Option(envvar="CHAINFED_ADDRESS", help="the address of the service")]
KeyFile = Annotated[Path | None, typer.Option(help="a file with the API key; by default CHAINFED_API_KEY has it")]
JobId = Annotated[str, typer.Argument(help="the id of a job, from `chainfed list`")]


def pause(job: JobId, address: Address = ADDRESS, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Pause a job: it stops after the round that runs, and its processes end. `chainfed resume` lets it go on."""
    record = ServiceClient(address, read_key(key_file)).pause(job)
    answer(as_json, record, f"Job {job} is {record['status']}; `chainfed resume {job}` lets it go on.")


def resume(job: JobId, address: Address = ADDRESS, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Let a paused job go on from its last round, as soon as there is a free place."""
    record = ServiceClient(address, read_key(key_file)).resume(job)
    answer(as_json, record, f"Job {job} is {record['status']}; `chainfed watch {job}` follows it.")


def cancel(job: JobId, address: Address = ADDRESS, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Cancel a job that is not over."""
    record = ServiceClient(address, read_key(key_file)).cancel(job)
    answer(as_json, record, f"Job {job} is {record['status']}.")
