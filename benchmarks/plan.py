"""``python -m benchmarks plan``: the CPU seconds of a job's dry run, and of the check that it can run."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.cell_process import Row
from benchmarks.shapes import PLANNED, Shape, written
from chainfed_ray.units import format_seconds

_WORDS, _ROWS, _CLASSES = 1000, 1000, 4
# The smallest class is excluded, so that the dry run also looks for the changes with which it could take part.
_FLEET = (("watch", 8, "12MiB"), ("phone", 8, "256MiB"), ("silo", 4, "8GiB"))
_CODE = {
    "plan": "from chainfed_ray.api.command.entry import main; main()",
    "check": "import sys; from pathlib import Path; from chainfed_ray.api.command.cli import read_job; "
    "from chainfed_ray.planning.prepare import prepare_job; prepare_job(read_job(Path(sys.argv[1])), Path())",
}
_progress = Console(stderr=True, highlight=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    names = [shape.name for shape in PLANNED]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, help="by default all")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="the folder for the temporary weights"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure the rows that were asked for, write each as soon as it is measured, and print the table."""
    rows: list[Row] = []
    shapes = [shape for shape in PLANNED if shape.name in options.shapes]
    for model in dict.fromkeys(shape.model for shape in shapes):
        alike = [shape for shape in shapes if shape.model == model]
        with written(alike[0], options.scratch) as folder:
            if isinstance(folder, str):
                _progress.print(f"{', '.join(shape.name for shape in alike)} is skipped: {folder}.")
                continue
            for shape in alike:
                rows.append(_measure(shape, folder))
                _progress.print(f"{shape.name}  {rows[-1]}")
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    Console(highlight=False).print(_table(rows))
    print(f"{platform.machine()}, {os.cpu_count()} cores; {date.today()}")


def _measure(shape: Shape, folder: Path) -> Row:
    job = a_job(shape, folder)
    found: Row = {"shape": shape.name, "check_cpu_seconds": _run("check", str(job))[0]}
    found["plan_cpu_seconds"], printed = _run("plan", "plan", str(job), "--json")
    return found | {"estimated_seconds": json.loads(printed)["estimated_seconds"]}


def _run(what: str, *arguments: str) -> tuple[float, str]:
    """Run one of ``_CODE`` in its own process; give its CPU seconds, imports included, and what it printed."""
    command = [sys.executable, "-c", _CODE[what], *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{what} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime, printed


def a_job(shape: Shape, folder: Path) -> Path:
    """Write a job file to ``folder``, with a tokenizer for the model there and texts of ``shape.tokens`` tokens each."""
    word_tokenizer().save_pretrained(folder)
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in _texts(shape)))
    document: dict[str, Any] = {
        "name": shape.name,
        "model": {"base": f"path:{folder}", "dtype": shape.dtype},
        "data": {"train": f"path:{rows}", "text": "text", "max_length": shape.tokens},
        "fleet": {"clients": [{"name": name, "count": count, "memory": memory} for name, count, memory in _FLEET]},
        "rounds": {"clients": 4, "batch_size": shape.batch},
    }
    if shape.language_model:
        document["model"]["task"] = "causal-lm"
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of a thousand words, ``w0`` to ``w999``."""
    vocabulary = {"<pad>": 0, "<unk>": 1} | {f"w{number}": 2 + number for number in range(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def _texts(shape: Shape) -> list[dict[str, str]]:
    chosen = np.random.default_rng(0).integers(0, _WORDS, (_ROWS, shape.tokens))
    return [
        {"text": " ".join(f"w{number}" for number in row), "label": f"class {place % _CLASSES}"}
        for place, row in enumerate(chosen.tolist())
    ]


def _table(rows: list[Row]) -> Table:
    table = Table("shape", box=None, header_style="bold", pad_edge=False)
    for name in ("check, CPU", "plan, CPU", "estimate of the job"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        seconds = (f"{row[name]:.1f} s" for name in ("check_cpu_seconds", "plan_cpu_seconds"))
        table.add_row(row["shape"], *seconds, format_seconds(row["estimated_seconds"]))
    return table
