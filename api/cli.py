"""The ``chainfed`` command."""

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from chainfed_ray.commit_log import CommitLog
from chainfed_ray.config import JobSpec
from chainfed_ray.coordinator import Coordinator
from chainfed_ray.errors import ChainFedError, InvalidJob
from chainfed_ray.job import Job, prepare
from chainfed_ray.quantities import format_bytes, format_seconds
from chainfed_ray.records import Ending, Opening, Round

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Federated fine-tuning, one window of layers at a time."
)
_words = Console(stderr=True, highlight=False)


@app.callback()
def chainfed() -> None:
    """Federated fine-tuning of language models for fleets of unequal machines."""


@app.command()
def run(
    job: Annotated[Path, typer.Argument(help="a job file, such as examples/demo.yaml")],
    out: Annotated[Path, typer.Option(help="the folder for commits; the same folder resumes")] = Path("chainfed-data"),
    as_json: Annotated[bool, typer.Option("--json", help="print the result as one JSON object")] = False,
) -> None:
    """Train a job on a Ray cluster of its own, with progress, and print the result."""
    spec = _read(job)
    with tempfile.TemporaryDirectory(prefix="chainfed-") as scratch:
        _words.print(f"Reading the data and planning the clients of [bold]{spec.name}[/bold] …")
        prepared = prepare(spec, Path(scratch))
        log = CommitLog(_folder(out, spec))
        result = _train(prepared, log)
    if as_json:
        print(json.dumps(result))


def main() -> None:
    """The entry point: an error that we foresaw is words and exit code 2, not a traceback."""
    try:
        app()
    except InvalidJob as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    except ChainFedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _read(path: Path) -> JobSpec:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidJob.at("(file)", str(path), f"a job file that can be read ({error})") from None
    return JobSpec.from_yaml(text)


def _folder(out: Path, spec: JobSpec) -> Path:
    """The job's folder; its commits belong to one specification and are never continued with another."""
    folder = out / spec.name
    kept = folder / "job.json"
    document = json.dumps(spec.document(), indent=2)
    if kept.exists() and kept.read_text() != document:
        raise InvalidJob.at("name", spec.name, f"a name not used in {out} yet: {folder} holds a job that differs")
    folder.mkdir(parents=True, exist_ok=True)
    aside = kept.with_suffix(".partial")
    aside.write_text(document)
    aside.replace(kept)
    return folder


def _train(job: Job, log: CommitLog) -> dict[str, Any]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of this process alone, on loopback
    import ray  # takes seconds, and a refused job need not wait for it

    from cluster.ray_pool import RayPool

    _words.print("Starting Ray …")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, namespace="chainfed")
    pool = RayPool(job.base, width=max(os.cpu_count() or 1, 1))
    try:
        coordinator = Coordinator(job, pool, log)
        opening = coordinator.open()
        _tell_opening(opening)
        for record in log.rounds():
            _tell_round(opening, record, resumed=True)
        for record in coordinator.rounds():
            _tell_round(opening, record)
        ending = coordinator.finish()
    finally:
        pool.close()
        ray.shutdown()
    _words.print(f"Done: {ending.accuracy:.1%} of the test rows are classified right by the whole chain.")
    return _result(job, opening, log.rounds(), ending)


def _tell_opening(opening: Opening) -> None:
    _words.print(f"{len(opening.admitted)} clients take part, {len(opening.left_out)} are left out:")
    for client in opening.left_out:
        _words.print(f"  {client.client}: {client.reason}")
    if opening.similarities:
        shown = " ".join(f"{value:.2f}" for value in opening.similarities)
        _words.print(f"Similarity (CKA) of each layer to the embeddings: {shown}")
    _words.print(f"The chain starts at layer {opening.start_layer} of {opening.layers}: {opening.stages} windows.")


def _tell_round(opening: Opening, record: Round, resumed: bool = False) -> None:
    accuracy = "–" if record.accuracy is None else f"{record.accuracy:.1%}"
    peaks = [turn.peak_bytes for turn in record.turns if turn.peak_bytes is not None]
    peak = format_bytes(max(peaks)) if peaks else "–"
    _words.print(
        f"round {record.index + 1:>3}/{opening.total_rounds}  layers {record.bottom}–{record.top}  "
        f"clients {len(record.turns)} ok {len(record.lost)} lost  accuracy {accuracy}  peak {peak}  "
        + ("(resumed)" if resumed else format_seconds(record.seconds))
    )
    for lost in record.lost:
        _words.print(f"    {lost.reason}")
    if record.ended:
        _words.print(f"    stage {record.stage + 1} ends: {record.ended}")


def _result(job: Job, opening: Opening, rounds: list[Round], ending: Ending) -> dict[str, Any]:
    return {
        "job": job.spec.name,
        "status": ending.status,
        "accuracy": ending.accuracy,
        "start_layer": opening.start_layer,
        "stages": [
            {"stage": record.stage, "bottom": record.bottom, "top": record.top, "ended": record.ended}
            for record in rounds
            if record.ended
        ],
        "left_out": [client.model_dump() for client in opening.left_out],
        "peak_bytes": ending.peak_bytes,
    }
