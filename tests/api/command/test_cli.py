"""Promise: a run killed with SIGKILL and started again ends bit for bit where it would have; bad jobs end in words."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml

from chainfed_ray.api.command.cli import read_job
from chainfed_ray.records.commit_log import CommitLog
from tests.builders import a_job, run
from tests.project import COMMAND, ROOT
from tests.watching import processes_below


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.faults)])
def test_a_run_that_was_interrupted_or_killed_goes_on_where_it_was(
    end: signal.Signals, document: dict[str, Any], tmp_path: Path
) -> None:
    document["rounds"] |= {"total": 4}
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(document))
    command = [*COMMAND, "run", str(job_file), "--out", str(tmp_path / "out"), "--json"]
    environment = {**os.environ, "CHAINFED_CLIENT_SLOTS": "1"}  # a process takes seconds to start
    log = CommitLog(tmp_path / "out" / "tiny")
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=heeds_interruptions,
    ) as process:
        assert process.stderr is not None
        assert any("round 2/4" in line for line in process.stderr)
        assert not processes_below("ray::IDLE", pid=process.pid), "processes that nobody uses"
        process.send_signal(end)
        said = process.stderr.read()
    assert "Traceback" not in said
    if end == signal.SIGINT:
        assert (process.returncode, "Run the same command again to resume the job" in said) == (130, True)
    assert 2 <= len(log.rounds()) < 4

    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert "resumed" in done.stderr
    coordinator, expected = run(a_job(document, tmp_path), tmp_path / "never-killed")
    assert result["accuracy"] == coordinator.finish().accuracy
    assert result.keys() >= {"job", "status", "accuracy", "start_layer", "stages", "excluded", "peak_bytes"}
    found = log.tensors(3)
    for name, tensor in expected.items():
        assert (found[f"stack/{name}"] == tensor).all(), name
    assert as_documented(document["model"]["base"], tmp_path / "out" / "tiny" / "model", "salt tide wave") == "sea"


def heeds_interruptions() -> None:
    """A shell's background job, such as these tests may be, is started to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def as_documented(base: str, folder: Path, text: str) -> str:
    """What the program in docs/models.md prints, for another base model and another text."""
    program = re.findall(r"(?:^(?: {4}.*)?\n)+", (ROOT / "docs" / "models.md").read_text(), re.MULTILINE)
    code = next(dedent(part) for part in program if "PeftModel" in part)
    for documented, ours in (
        ('"builtin:minilm"', repr(base)),
        ('"Compute the eigenvalues of a sparse matrix."', repr(text)),
    ):
        assert documented in code
        code = code.replace(documented, ours)
    with redirect_stdout(io.StringIO()) as said:
        exec(code, {"FOLDER": folder})
    return said.getvalue().strip()


@pytest.mark.slow
def test_files_that_a_job_names_are_meant_from_where_the_command_is_run(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document["model"] = {"base": "path:base", "task": "causal-lm"}
    document["data"] = {"train": "path:train.csv", "validation": "path:validation.csv", "test": "hf:some/test"}
    document["chain"]["head"], document["evaluation"] = "model", {"choices": "path:choices.jsonl"}
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(document))
    monkeypatch.chdir(tmp_path)
    spec = read_job(job_file)
    assert spec.model.base == f"path:{tmp_path}/base"
    sources = (spec.data.train, spec.data.validation, spec.data.test, spec.evaluation.choices)
    assert sources == (
        f"path:{tmp_path}/train.csv",
        f"path:{tmp_path}/validation.csv",
        "hf:some/test",
        f"path:{tmp_path}/choices.jsonl",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("submit", f"{ROOT}/examples/demo.yaml", "--address", "http://127.0.0.1:9"),  # nobody answers there
        ("run", os.devnull),
        ("plan", os.devnull),
    ],
    ids=lambda arguments: arguments[0],
)
def test_help_and_the_check_of_a_job_file_load_neither_torch_nor_ray(arguments: tuple[str, ...]) -> None:
    code = "import sys\nfrom chainfed_ray.api.command.entry import main\ntry: main()\nfinally: print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    loaded = set(done.stdout.partition("loaded:")[2].split())
    assert "chainfed_ray.spec.job" in loaded, done.stderr
    assert not loaded & {"torch", "ray", "sqlalchemy", "transformers", "pandas", "matplotlib", "numpy"}


@pytest.mark.slow
@pytest.mark.parametrize(("text", "field"), [("name: [", "(file)"), ("name: x\nmodle: {}", "modle")])
def test_a_bad_job_ends_in_words(tmp_path: Path, text: str, field: str) -> None:
    job_file = tmp_path / "job.yaml"
    job_file.write_text(text)
    done = subprocess.run([*COMMAND, "run", str(job_file)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"error: {field}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_folder_that_is_a_file_ends_in_words(document: dict[str, Any], tmp_path: Path) -> None:
    job_file, out = tmp_path / "job.yaml", tmp_path / "out"
    job_file.write_text(yaml.safe_dump(document))
    out.write_text("a file, where a folder is meant")
    done = subprocess.run(
        [*COMMAND, "run", str(job_file), "--out", str(out), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {out}/tiny: ")
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "DiskFailed"


@pytest.mark.slow
def test_a_terminal_without_a_dash_costs_the_dash_alone() -> None:
    code = (
        "from chainfed_ray.api.command import cli, entry\ncli.app = lambda: print('perplexity \\u2013 \\u201c5\\u201d')"
    )
    code += "\nentry.main()"
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60, check=True)
    assert done.stdout == b"perplexity ? ?5?\n"


@pytest.mark.slow
def test_a_folder_outside_of_ascii_is_named_whatever_the_locale(document: dict[str, Any], tmp_path: Path) -> None:
    """By the locale of this process its bytes are no text, and a job with them could not even be sent."""
    document["model"]["base"] = "path:nothing"
    folder = tmp_path / "K\u00f6ln"
    folder.mkdir()
    (folder / "job.yaml").write_text(yaml.safe_dump(document))
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    command = [*COMMAND, "plan", "job.yaml", "--json"]
    done = subprocess.run(command, capture_output=True, cwd=folder, env=environment, timeout=120, check=False)
    assert done.returncode == 2
    assert (
        done.stderr.decode() == f"error: model.base is 'path:{tmp_path}/K?ln/nothing'; expected a folder that exists\n"
    )
    (problem,) = json.loads(done.stdout)["error"]["problems"]
    assert problem["value"] == f"'path:{folder}/nothing'"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "complete"])
def test_bytes_that_are_no_text_are_refused_in_words(command: str) -> None:
    done = subprocess.run([*COMMAND, command, "m"], input=b"caf\xe9", capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: (standard input) is b'caf\\xe9'; expected text in UTF-8 (")
