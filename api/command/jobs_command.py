"""Commands that list the jobs of the service, and tell one what to do: pause, go on, end, be tried again, be deleted."""

from typing import Annotated, Any

import typer
from rich.table import Column, Table

from chainfed_ray.api.operator.answers import Json, answer
from chainfed_ray.api.sdk import calls
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.api.sdk.keys import read_key
from chainfed_ray.api.transfer.options import ADDRESS, Address, JobId, KeyFile
from chainfed_ray.errors import InvalidJob, InvalidSetting
from chainfed_ray.spec.parse import document_of


def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="how many jobs to show, the newest first")] = 20,
    state: Annotated[list[str] | None, typer.Option(help="only jobs in this state, or in one of several")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="only jobs with this label, such as team=search; repeatable")
    ] = None,
    address: Address = ADDRESS,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Show the service's jobs and models."""
    with Client(address, read_key(key_file)) as service:
        jobs = service.json(calls.list_jobs(limit, state=state or (), label=label or ()))["jobs"]
    # Long names wrap to the next line. A name cut short could not be pasted into another command.
    job_column, model_column = (Column(name, overflow="fold") for name in ("job", "model"))
    table = Table(job_column, "status", "submitted (UTC)", "accuracy", model_column, box=None, header_style="bold")
    for job in jobs:
        accuracy = "" if job["accuracy"] is None else f"{job['accuracy']:.1%}"
        submitted = job["submitted_at"][:19].replace("T", " ")
        table.add_row(job["id"], job["status"], submitted, accuracy, job["model"] if accuracy else "")
    answer(as_json, {"jobs": jobs}, table if jobs else "There are no jobs yet; `chainfed submit job.yaml` sends one.")


def pause(job: JobId, address: Address = ADDRESS, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Pause a job: it stops after the round that runs, and its processes end. `chainfed resume` lets it go on."""
    with Client(address, read_key(key_file)) as service:
        record = service.json(calls.pause_job(job))
    answer(as_json, record, f"Job {job} is {record['status']}; `chainfed resume {job}` lets it go on.")


def resume(job: JobId, address: Address = ADDRESS, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Let a paused job go on from its last round, as soon as there is a free place."""
    with Client(address, read_key(key_file)) as service:
        record = service.json(calls.resume_job(job))
    answer(as_json, record, f"Job {job} is {record['status']}; `chainfed watch {job}` follows it.")


def cancel(job: JobId, address: Address = ADDRESS, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Cancel a job that is not over."""
    with Client(address, read_key(key_file)) as service:
        record = service.json(calls.cancel_job(job))
    answer(as_json, record, f"Job {job} is {record['status']}.")


def retry(job: JobId, address: Address = ADDRESS, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Try a job again that failed or was cancelled. It goes on from its last round."""
    with Client(address, read_key(key_file)) as service:
        record = service.json(calls.retry_job(job))
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
    with Client(address, read_key(key_file)) as service:
        record = service.json(calls.clone_job(job, patch_of(changes or [])))
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
    with Client(address, read_key(key_file)) as service:
        service.json(calls.delete_job(job))
    answer(as_json, {"id": job, "status": "deleted"}, f"Job {job} is deleted.")


def patch_of(changes: list[str]) -> dict[str, Any]:
    """The merge patch that ``key.inner=value`` texts ask for. A value is YAML, as in a job file.

    Raises:
        InvalidSetting: a text has no key or no value, or its value is not YAML.
        InvalidJob: versions of YAML read its value differently.
    """
    patch: dict[str, Any] = {}
    for change in changes:
        path, equals, text = change.partition("=")
        *outer, last = path.split(".")
        try:
            value = document_of(text, path)
        except InvalidJob:
            raise
        except Exception:  # as of a whole file: a text may hold anything, and so may what its reader raises
            equals = ""
        place: Any = patch
        for key in outer:
            place = place.setdefault(key, {}) if isinstance(place, dict) else None
        if not equals or not all((*outer, last)) or not isinstance(place, dict):
            raise InvalidSetting("--set", change, "a key and a value in YAML, such as rounds.total=40")
        place[last] = value
    return patch
