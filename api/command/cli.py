"""The ``chainfed`` command: its subcommands, and their options.

Progress goes to standard error. The answer goes to standard output: as text, or with ``--json`` as one JSON object.
"""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, RenderableType

from chainfed_ray.activity import Reporter
from chainfed_ray.api.command import jobs_command
from chainfed_ray.api.command.export_command import Format, NewFolder, StackFolder, export_model
from chainfed_ray.api.command.interruption import INTERRUPTED, Interruption, ending_at_once
from chainfed_ray.api.command.join_command import join
from chainfed_ray.api.operator.answers import Json, answer, standard_input
from chainfed_ray.api.operator.backup_command import backup, restore
from chainfed_ray.api.operator.database_command import database_app
from chainfed_ray.api.operator.keys_command import keys_app
from chainfed_ray.api.operator.sites_command import sites_app
from chainfed_ray.api.report.pictures import check_drawing, draw_if_possible, write_if_possible
from chainfed_ray.api.sdk import calls, exchanges
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.api.sdk.keys import read_key
from chainfed_ray.api.transfer.artifacts_command import artifacts
from chainfed_ray.api.transfer.data_command import data_app
from chainfed_ray.api.transfer.logs_command import logs
from chainfed_ray.api.transfer.options import ADDRESS, Address, JobId, KeyFile
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.device.model_list import keep_model_list
from chainfed_ray.errors import ChainFedError, DiskFailed, InvalidJob
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job, parse_yaml

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of language models for fleets of unequal machines, one window of layers at a time.",
)
app.add_typer(keys_app, name="keys")
app.add_typer(sites_app, name="sites")
app.add_typer(data_app, name="data")
app.add_typer(database_app, name="database")
app.command()(backup)
app.command()(restore)
app.command()(join)
app.command()(artifacts)
app.command()(logs)
app.command("list")(jobs_command.list_jobs)
for _control in (
    jobs_command.pause,
    jobs_command.resume,
    jobs_command.cancel,
    jobs_command.retry,
    jobs_command.clone,
    jobs_command.delete,
):
    app.command()(_control)
_progress = Console(stderr=True, highlight=False, markup=False)

JobFile = Annotated[Path, typer.Argument(help="a job file, such as examples/demo.yaml")]
Out = Annotated[Path, typer.Option(help="the folder for commits, models and plots")]
_DEMO, _CHAT_DEMO = Path("examples/demo.yaml"), Path("examples/chat.yaml")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"chainfed-ray {version('chainfed-ray')}")
        raise typer.Exit


@app.callback()
def chainfed(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version and exit")
    ] = False,
) -> None:
    """Holds the options of ``chainfed`` itself. Its ``--help`` shows the text given to ``app``, not this one."""


@app.command()
def run(job: JobFile, out: Out = Path("chainfed-data"), as_json: Json = False) -> None:
    """Train a job without a service, on a Ray cluster of its own. The same command again resumes an interrupted job."""
    spec = read_job(job)  # comes first: the imports take seconds, and a mistake in the file shows at once

    with ending_at_once():
        from chainfed_ray.api.command.training import folder_of, train
        from chainfed_ray.api.report.progress import ProgressDisplay
        from chainfed_ray.api.report.results import results
        from chainfed_ray.device.lean_imports import load_models

        load_models()
    folder = folder_of(out, spec)
    resumable = _if_interrupted("Interrupted. Run the same command again to resume the job.")
    with resumable as interruption, ProgressDisplay(_progress, spec.name, spec, interruption.check) as progress:
        job_started, rounds, job_finished, result = train(spec, folder, Settings(Storage.at(out)), progress, as_json)
        Reporter("drawing the plots", progress.listen).begin()
        _, drawn = draw_if_possible(folder / "plots", job_started, rounds, job_finished, spec.chain.cka_threshold)
    saved = f"The model is in {folder / 'model'}."
    answer(as_json, result.model_dump(mode="json"), results(spec, job_started, rounds, job_finished), saved, drawn)


@app.command()
def plan(
    job: JobFile,
    picture: Annotated[
        Path | None, typer.Option(help="write a picture of each class's planned memory to this PNG file")
    ] = None,
    as_json: Json = False,
) -> None:
    """Forecast a job without training it: which clients can join, memory, network, time, and what one change would gain."""
    spec = read_job(job)
    if picture:
        check_drawing()

    with ending_at_once():
        from chainfed_ray.api.report.activity_display import ActivityDisplay
        from chainfed_ray.api.report.forecast_table import forecast_table
        from chainfed_ray.device.lean_imports import load_models
        from chainfed_ray.planning.dry_run import dry_run

        load_models()
    with _if_interrupted("Interrupted."), ActivityDisplay(_progress) as listen:
        forecast = dry_run(spec, min(Settings.client_slots, os.cpu_count() or 1), listen)  # a turn takes one core
    parts: list[RenderableType] = [forecast_table(forecast)]
    if picture:
        from chainfed_ray.api.report.forecast_picture import png

        parts.append(write_if_possible(picture, lambda: png(forecast)))
    answer(as_json, forecast.model_dump(mode="json"), *parts)


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="the network address to listen on; 0.0.0.0 listens on all of this machine's")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="the port to listen on")] = 8000,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="without a key, let whoever reaches the service use it")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the service on this machine until it is interrupted. A service that fails is started again, and its jobs resume."""
    from chainfed_ray.api.command.local_service import local_service
    from chainfed_ray.api.report.activity_display import ActivityDisplay

    settings = Settings.from_environment()
    _progress.print(f"Jobs and models are kept in {settings.storage.shown_place}.")
    with ExitStack() as until_interrupted:
        with ActivityDisplay(_progress) as listen:
            made = local_service(settings, host, port, listen, _progress.print, insecure)
            service = until_interrupted.enter_context(made)
        address = service.address
        ready = {"status": "ready", "address": address, "storage": settings.storage.shown_place}
        answer(as_json, ready, f"The service answers at {address} (routes: {address}/docs). Ctrl-C stops it.")
        with suppress(KeyboardInterrupt):
            service.watch()
        _progress.print("Stopping the service. Running jobs resume when it starts again.")


@app.command()
def submit(
    job: JobFile,
    watch: Annotated[bool, typer.Option("--watch", help="follow the job until it is over")] = False,
    address: Address = ADDRESS,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Send a job to the service."""
    from chainfed_ray.api.report.activity_display import ActivityDisplay

    client, document = Client(address, read_key(key_file)), read_job(job).document()
    with ActivityDisplay(_progress) as listen:
        Reporter("waiting for the service to check the job", listen).begin()
        record = client.json(calls.submit_job(document))
    queued = f"Job {record['id']} is queued; `chainfed watch {record['id']}` follows it."
    if watch:
        _progress.print(queued)
        _follow(client, record, as_json)
    else:
        answer(as_json, record, queued)


@app.command()
def watch(job: JobId, address: Address = ADDRESS, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Show a job from its beginning, and follow it until it is over."""
    client = Client(address, read_key(key_file))
    _follow(client, client.json(calls.get_job(job)), as_json)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="the name of a model, such as minilm:docstrings")],
    text: Annotated[
        list[str] | None, typer.Argument(help="the texts; without any, each line of standard input is one")
    ] = None,
    address: Address = ADDRESS,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Classify texts with a model of the service."""
    texts = text or [line for line in re.split(r"\r?\n", standard_input()) if line.strip()]
    found = Client(address, read_key(key_file)).finish_json(exchanges.labels(model, texts))
    lines = [
        f"{label['label']} ({label['score']:.0%})  {line}" for line, label in zip(texts, found["results"], strict=True)
    ]
    answer(as_json, found, *lines)


@app.command()
def complete(
    model: Annotated[str, typer.Argument(help="the name of a language model, such as gpt2:recipes")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="the prompts; without any, all of standard input is one")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="the most tokens to generate; by default up to 256")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="randomness of sampling; 0 always takes the likeliest token")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="sample only from the likeliest tokens whose probabilities add up to this")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="end the text before this string; may be given up to four times")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="the same seed generates the same text again")] = None,
    address: Address = ADDRESS,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Continue prompts with a language model of the service, and print the text while it is generated."""
    client, prompts = Client(address, read_key(key_file)), prompt or [standard_input()]
    options = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "stop": stop or None, "seed": seed,
    }  # fmt: skip
    with _if_interrupted("Interrupted."):
        if as_json:
            answer(as_json, client.json(calls.completions(model, prompts, **options)))
            return
        for piece in client.stream_json(exchanges.texts(model, prompts, **options)):
            end = "\n" if piece["finish_reason"] else ""
            print(piece["text"], end=end, file=sys.__stdout__, flush=True)


@app.command()
def export(folder: StackFolder, out: NewFolder, form: Format, as_json: Json = False) -> None:
    """Write a finished model in the form of another engine: PEFT, Transformers or ONNX."""
    with _if_interrupted("Interrupted. Nothing was written."):
        answer(as_json, *export_model(folder, out, form))


@app.command()
def doctor(
    build: Annotated[
        bool, typer.Option("--build", help="compile DeepSpeed's libraries once; this takes a minute or two")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell which evaluation engines work on this machine, and what to install. Exits with 1 if DeepSpeed does not."""
    from chainfed_ray.api.operator.doctor_table import diagnosis
    from chainfed_ray.api.report.activity_display import ActivityDisplay
    from chainfed_ray.cluster.offload.build import build_ops, ops_folder

    if build:
        _progress.print(f"Compiling DeepSpeed's libraries into {ops_folder()}; this takes a minute or two, once.")
        with _if_interrupted("Interrupted. The same command starts over."), ActivityDisplay(_progress) as listen:
            Reporter("compiling DeepSpeed's libraries", listen).begin()
            build_ops(ops_folder())
    document, parts = diagnosis()
    answer(as_json, document, *parts)
    if not document["deepspeed"]:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="the folder for commits, models and plots")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="a language model of 135 million weights, in ten minutes")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show everything in a few minutes, from a checkout: start the service, train a chain, call the model, and stop."""
    job_file = _CHAT_DEMO if chat else _DEMO
    spec = read_job(job_file)

    from chainfed_ray.api.command.chat_demo import chat_demo
    from chainfed_ray.api.command.demo import demo as plain_demo

    story = _progress if as_json else Console(file=sys.__stdout__, highlight=False, markup=False)
    with _if_interrupted("Interrupted."):
        if chat:
            answer(as_json, chat_demo(spec, job_file, out or Path("chainfed-chat"), story))
        else:
            answer(as_json, plain_demo(spec, job_file, out or Path("chainfed-demo"), story))


def main(terminal: str | None) -> None:
    """Run the command. A ``ChainFedError`` is printed as a message with an exit code, without a traceback.

    The exit code is 2 for an invalid job, and 1 for any other ``ChainFedError``. ``terminal`` is the encoding of the terminal;
    None if Python knows it.
    """
    # No process below imports modules from the folder in which the command was given.
    os.environ["PYTHONSAFEPATH"] = "1"
    keep_model_list()
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.__stdout__, sys.__stderr__):
        if isinstance(stream, TextIOWrapper):
            # On an ASCII terminal a dash becomes a question mark, and nothing else is lost.
            stream.reconfigure(encoding=terminal, errors="replace")
    try:
        app()
    except InvalidJob as error:
        _fail(error, [str(problem) for problem in error.problems], 2)
    except ChainFedError as error:
        _fail(error, [str(error)], 1)
    except OSError as error:  # of the user's own disk, most of all: it is full, or a file is where a folder is meant
        failed = DiskFailed(str(error.filename or "the disk"), error.strerror or str(error))
        _fail(failed, [str(failed)], 1)


def read_job(path: Path) -> JobSpec:
    """Read and check the job in the file ``path``.

    Relative ``path:`` sources become absolute, from the current folder: the service may run in another one.

    Raises:
        InvalidJob: the file cannot be read, or the job in it is invalid.
    """
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


def _follow(client: Client, record: dict[str, Any], as_json: bool) -> None:
    from chainfed_ray.api.command.following import follow
    from chainfed_ray.api.report.results import results

    spec = parse_job(record["spec"])
    with _if_interrupted(f"The job keeps running; `chainfed watch {record['id']}` follows it again."):
        records = follow(client, record["id"], spec, _progress)
    command = "complete" if spec.model.task == "causal-lm" else "predict"
    how_to_call = f"To call the model: chainfed {command} {record['model']} 'a text'"
    shown = [results(spec, *records)] if records else []
    answer(as_json, client.json(calls.get_job(record["id"])), *shown, how_to_call)


@contextmanager
def _if_interrupted(message: str) -> Iterator[Interruption]:
    """On Ctrl-C in the block, print ``message`` and exit with 130."""
    try:
        with Interruption() as interruption:
            yield interruption
    except KeyboardInterrupt:
        _progress.print(message)
        raise typer.Exit(INTERRUPTED) from None


def _fail(error: ChainFedError, lines: list[str], code: int) -> NoReturn:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    answer("--json" in sys.argv, {"status": "failed", "error": error.document()})
    raise SystemExit(code) from None


def _terminate(*_: object) -> NoReturn:
    """Handle SIGTERM as Ctrl-C is handled, so that every ``finally`` block runs."""
    raise KeyboardInterrupt
