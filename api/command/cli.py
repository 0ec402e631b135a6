"""The ``chainfed`` command.

Progress goes to standard error; what was asked for to standard output, as words or, with ``--json``, as one object.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.table import Column, Table

from chainfed_ray.activity import Reporter
from chainfed_ray.api.command.client import ServiceClient
from chainfed_ray.api.command.interruption import Interruption
from chainfed_ray.api.report.pictures import NOT_DRAWN, check_drawing, draw_if_possible
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.errors import ChainFedError, InvalidJob
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job, parse_yaml

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of language models for fleets of unequal machines, one window of layers at a time.",
)
_progress = Console(stderr=True, highlight=False)

JobFile = Annotated[Path, typer.Argument(help="a job file, such as examples/demo.yaml")]
JobId = Annotated[str, typer.Argument(help="the id of a job, from `chainfed list`")]
Out = Annotated[Path, typer.Option(help="the folder for commits, models and plots")]
Address = Annotated[str, typer.Option(envvar="CHAINFED_ADDRESS", help="of the service")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output")]
_INTERRUPTED = 130  # as shells have it
_DEMO = Path("examples/demo.yaml")
_ADDRESS = "http://127.0.0.1:8000"


def _print_version(asked: bool) -> None:
    if asked:
        print(f"chainfed-ray {version('chainfed-ray')}")
        raise typer.Exit


@app.callback()
def chainfed(
    _: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print it")] = False,
) -> None:
    """What every command has in common; its words for `--help` are those of `app`."""


@app.command()
def run(job: JobFile, out: Out = Path("chainfed-data"), as_json: Json = False) -> None:
    """Train a job without a service, on a Ray of its own. Run again with the same folder, it goes on where it was."""
    spec = read_job(job)  # what is wrong with it is said at once: the imports take seconds

    from chainfed_ray.api.command.training import folder_of, train
    from chainfed_ray.api.report.progress import ProgressDisplay
    from chainfed_ray.api.report.results import results

    folder = folder_of(out, spec)
    goes_on = _if_interrupted("Interrupted. The same command goes on where it was.")
    with goes_on as interruption, ProgressDisplay(_progress, spec.name, spec, interruption.check) as progress:
        job_started, rounds, job_finished, result = train(spec, folder, Settings(Storage.at(out)), progress)
        Reporter("drawing the plots", progress.listen).begin()
        plots = draw_if_possible(folder / "plots", job_started, rounds, job_finished, spec.chain.cka_threshold)
    made = f"The model is in {folder / 'model'}."
    drawn = f"{len(plots)} plots are in {folder / 'plots'}." if plots else NOT_DRAWN
    _answer(as_json, result.model_dump(mode="json"), results(spec, job_started, rounds, job_finished), made, drawn)


@app.command()
def plan(
    job: JobFile,
    picture: Annotated[Path | None, typer.Option(help="a PNG file for each class's memory, part by part")] = None,
    as_json: Json = False,
) -> None:
    """Tell what a job would be like, without training it: who can join, bytes, about how long, what changes would buy."""
    spec = read_job(job)
    if picture:
        check_drawing()

    from chainfed_ray.api.report.activity_display import ActivityDisplay
    from chainfed_ray.api.report.forecast_table import forecast_table
    from chainfed_ray.forecast.dry_run import dry_run
    from chainfed_ray.lean_imports import without_scipy

    with _if_interrupted("Interrupted."), ActivityDisplay(_progress) as listen, without_scipy():
        found = dry_run(spec, min(Settings.client_slots, os.cpu_count() or 1), listen)  # a turn takes one core
    words: list[RenderableType] = [forecast_table(found)]
    if picture:
        from chainfed_ray.api.report.forecast_picture import png

        picture.write_bytes(png(found))
        words.append(f"The picture is in {picture}.")
    _answer(as_json, found.model_dump(mode="json"), *words)


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="the address to listen on; 0.0.0.0 is every one")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    as_json: Json = False,
) -> None:
    """Run the service on this machine until it is interrupted. Jobs that were running go on when it starts again."""
    from chainfed_ray.api.command.local_service import local_service
    from chainfed_ray.api.report.activity_display import ActivityDisplay

    settings = Settings.from_environment()
    _progress.print(f"Jobs and models are kept in {settings.storage.root}.")
    with ExitStack() as until_interrupted:
        with ActivityDisplay(_progress) as listen:
            address = until_interrupted.enter_context(local_service(settings, host, port, listen))
        ready = {"status": "ready", "address": address, "storage": str(settings.storage.root)}
        _answer(as_json, ready, f"The service answers at {address} (routes: {address}/docs). Ctrl-C ends it.")
        with suppress(KeyboardInterrupt):
            while True:
                signal.pause()
        _progress.print("Stopping the service. Jobs that were running go on when it starts again.")


@app.command()
def submit(
    job: JobFile,
    watch: Annotated[bool, typer.Option("--watch", help="follow the job until it is over")] = False,
    address: Address = _ADDRESS,
    as_json: Json = False,
) -> None:
    """Send a job to the service."""
    from chainfed_ray.api.report.activity_display import ActivityDisplay

    client, document = ServiceClient(address), read_job(job).document()
    with ActivityDisplay(_progress) as listen:
        record = client.submit(document, listen)
    queued = f"Job {record['id']} is queued; `chainfed watch {record['id']}` follows it."
    if watch:
        _progress.print(queued)
        _follow(client, record, as_json)
    else:
        _answer(as_json, record, queued)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="how many, the newest first")] = 20,
    address: Address = _ADDRESS,
    as_json: Json = False,
) -> None:
    """Show the service's jobs and models."""
    client = ServiceClient(address)
    jobs = client.jobs(limit)
    # What is too long for the terminal goes on in the next line: a name that is cut is of no use.
    job_column, model_column = (Column(name, overflow="fold") for name in ("job", "model"))
    table = Table(job_column, "status", "submitted (UTC)", "accuracy", model_column, box=None, header_style="bold")
    for job in jobs:
        accuracy = "" if job["accuracy"] is None else f"{job['accuracy']:.1%}"
        submitted = job["submitted_at"][:19].replace("T", " ")
        table.add_row(job["id"], job["status"], submitted, accuracy, job["model"] if accuracy else "")
    _answer(as_json, {"jobs": jobs}, table if jobs else "There are no jobs yet; `chainfed submit job.yaml` sends one.")


@app.command()
def watch(job: JobId, address: Address = _ADDRESS, as_json: Json = False) -> None:
    """Follow a job until it is over, from its beginning."""
    client = ServiceClient(address)
    _follow(client, client.job(job), as_json)


@app.command()
def cancel(job: JobId, address: Address = _ADDRESS, as_json: Json = False) -> None:
    """End a job that is queued or running."""
    record = ServiceClient(address).cancel(job)
    _answer(as_json, record, f"Job {job} is {record['status']}.")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="the name of a model, such as minilm:docstrings")],
    text: Annotated[list[str] | None, typer.Argument(help="texts; none: the lines of standard input")] = None,
    address: Address = _ADDRESS,
    as_json: Json = False,
) -> None:
    """Classify texts with a model of the service."""
    texts = text or [line for line in sys.stdin.read().splitlines() if line.strip()]
    answer = ServiceClient(address).classify(model, texts)
    lines = [
        f"{found['label']} ({found['score']:.0%})  {line}" for line, found in zip(texts, answer["results"], strict=True)
    ]
    _answer(as_json, answer, *lines)


@app.command()
def complete(
    model: Annotated[str, typer.Argument(help="the name of a language model, such as gpt2:recipes")],
    prompt: Annotated[list[str] | None, typer.Argument(help="prompts; none: standard input is one")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="to write at most; by default up to 256")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the likeliest token")] = 1.0,
    top_p: Annotated[float, typer.Option(help="of the likeliest tokens, those with this much probability")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="the text ends before it; may be given four times")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="the same seed gives the same text again")] = None,
    address: Address = _ADDRESS,
    as_json: Json = False,
) -> None:
    """Go on with texts by a language model of the service, as it writes them."""
    client, prompts = ServiceClient(address), prompt or [sys.stdin.read()]
    options = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "stop": stop or None, "seed": seed,
    }  # fmt: skip
    with _if_interrupted("Interrupted."):
        if as_json:
            _answer(as_json, client.complete(model, prompts, **options))
            return
        for piece in client.stream(model, prompts, **options):
            end = "\n" if piece["finish_reason"] else ""
            print(piece["text"], end=end, file=sys.__stdout__, flush=True)


@app.command()
def doctor(
    build: Annotated[
        bool, typer.Option("--build", help="compile DeepSpeed's libraries, once; it takes a minute or two")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell what this machine can do, and how to get the rest. It fails if DeepSpeed cannot evaluate here."""
    from chainfed_ray.api.command.doctor_table import doctor_table, verdict
    from chainfed_ray.api.report.activity_display import ActivityDisplay
    from chainfed_ray.cluster.offload.build import build_ops, ops_folder
    from chainfed_ray.cluster.offload.doctor import findings, is_possible, look

    storage = os.environ.get("CHAINFED_STORAGE") or "chainfed-data"
    scratch = Path(os.environ.get("CHAINFED_SCRATCH") or f"{storage}/scratch").absolute()
    if build:
        _progress.print(f"Compiling DeepSpeed's libraries into {ops_folder()}; this takes a minute or two, once.")
        with _if_interrupted("Interrupted. The same command begins again."), ActivityDisplay(_progress) as listen:
            Reporter("compiling DeepSpeed's libraries", listen).begin()
            build_ops(ops_folder())
    found = findings(look(scratch))
    possible = is_possible(found)
    document = {"deepspeed": possible, "torch": True, "findings": [finding.document() for finding in found]}
    _answer(as_json, document, doctor_table(found), *verdict(found))
    if not possible:
        raise typer.Exit(1)


@app.command()
def demo(out: Out = Path("chainfed-demo"), as_json: Json = False) -> None:
    """The whole story in a few minutes, from a checkout: start the service, train a chain, call the model, stop it all."""
    spec = read_job(_DEMO)

    from chainfed_ray.api.command.demo import demo as tell

    story = _progress if as_json else Console(file=sys.__stdout__, highlight=False)
    with _if_interrupted("Interrupted."):
        _answer(as_json, tell(spec, _DEMO, out, story))


def main() -> None:
    """The entry point: an error that we foresaw is words and an exit code, not a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except InvalidJob as error:
        _fail(error, [str(problem) for problem in error.problems], 2)
    except ChainFedError as error:
        _fail(error, [str(error)], 1)


def read_job(path: Path) -> JobSpec:
    """The job in a file; files that it names are meant from where the command is run, wherever the service runs."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidJob.at("(file)", str(path), f"a job file that can be read ({error})") from None
    document = parse_yaml(text).document()
    document["model"]["base"] = _absolute(document["model"]["base"])
    for split in ("train", "validation", "test"):
        document["data"][split] = _absolute(document["data"][split])
    document["evaluation"]["choices"] = _absolute(document["evaluation"]["choices"])
    return parse_job(document)


def _absolute(source: str | None) -> str | None:
    scheme, _, path = (source or "").partition(":")
    return f"path:{Path(path).absolute()}" if scheme == "path" and path else source


def _follow(client: ServiceClient, record: dict[str, Any], as_json: bool) -> None:
    from chainfed_ray.api.command.following import follow
    from chainfed_ray.api.report.results import results

    spec = parse_job(record["spec"])
    with _if_interrupted(f"The job goes on without you; `chainfed watch {record['id']}` follows it again."):
        job_started, rounds, job_finished = follow(client, record["id"], spec, _progress)
    command = "complete" if spec.model.task == "causal-lm" else "predict"
    how = f"The model answers: chainfed {command} {record['model']} 'a text'"
    _answer(as_json, client.job(record["id"]), results(spec, job_started, rounds, job_finished), how)


@contextmanager
def _if_interrupted(words: str) -> Iterator[Interruption]:
    try:
        with Interruption() as interruption:
            yield interruption
    except KeyboardInterrupt:
        _progress.print(words)
        raise typer.Exit(_INTERRUPTED) from None


def _answer(as_json: bool, document: dict[str, Any], *words: RenderableType) -> None:
    """What was asked for, on standard output: an object for programs, or words for people."""
    output = sys.__stdout__  # where Ray runs, sys.stdout is for its words
    if as_json:
        print(json.dumps(document), file=output, flush=True)
        return
    console = Console(file=output, highlight=False)
    for part in words:
        plain = isinstance(part, str)
        console.print(part, soft_wrap=plain, markup=not plain)


def _fail(error: ChainFedError, words: list[str], code: int) -> NoReturn:
    for line in words:
        print(f"error: {line}", file=sys.stderr)
    _answer("--json" in sys.argv, {"status": "failed", "error": error.document()})
    raise SystemExit(code) from None


def _terminate(*_: object) -> NoReturn:
    """SIGTERM ends a command as Ctrl-C does: through every `finally`."""
    raise KeyboardInterrupt
