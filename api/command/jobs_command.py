"""Commands that tell a job of the service what to do: pause, go on, end, be tried again, with changes, be deleted."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from chainfed_ray.api.command.client import ServiceClient, read_key
from chainfed_ray.api.operator.answers import Json, answer
from chainfed_ray.errors import InvalidSetting

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


def retry(job: JobId, address: Address = ADDRESS, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Try a job again that failed or was cancelled. It goes on from its last round."""
    record = ServiceClient(address, read_key(key_file)).retry(job)
    answer(as_json, record, f"Job {job} is {record['status']}; `chainfed watch {job}` follows it.")


def clone(
    job: JobId,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="a key with its value, such as rounds.total=40; null gives it its default; repeatable"
        ),
    ] = None,
    address: Address = ADDRESS,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Send a job to the service that is like another one, with changes."""
    record = ServiceClient(address, read_key(key_file)).clone(job, patch_of(changes or []))
    answer(as_json, record, f"Job {record['id']} is queued; `chainfed watch {record['id']}` follows it.")


def delete(
    job: JobId,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask whether to delete it")] = False,
    address: Address = ADDRESS,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Delete a job that is over, with its files and its model."""
    if not yes:
        typer.confirm(f"Delete job {job}, its files and its model?", abort=True, err=True)
    ServiceClient(address, read_key(key_file)).delete(job)
    answer(as_json, {"id": job, "status": "deleted"}, f"Job {job} is deleted.")


def patch_of(changes: list[str]) -> dict[str, Any]:
    """The merge patch that ``key.inner=value`` texts ask for. A value is YAML, as in a job file.

    Raises:
        InvalidSetting: a text has no key or no value, or its value is not YAML.
    """
    patch: dict[str, Any] = {}
    for change in changes:
        path, equals, text = change.partition("=")
        *outer, last = path.split(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            equals = ""
        place: Any = patch
        for key in outer:
            place = place.setdefault(key, {}) if isinstance(place, dict) else None
        if not equals or not all((*outer, last)) or not isinstance(place, dict):
            raise InvalidSetting("--set", change, "a key and a value in YAML, such as rounds.total=40")
        place[last] = value
    return patch
