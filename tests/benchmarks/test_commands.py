"""``python -m benchmarks accuracy``: which runs there are, what is kept of them, and what is printed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
from rich.console import Console

from benchmarks import corpora
from benchmarks.accuracy_cells import Cell, Rates, Run, Study
from benchmarks.accuracy_protocols import PROTOCOLS
from benchmarks.accuracy_rows import NotOurRows, Row, Rows
from benchmarks.accuracy_runs import RunFailed
from benchmarks.accuracy_schedule import complete
from benchmarks.accuracy_table import regrets, results, tuning
from benchmarks.methods import END_TO_END, UNTRAINED, methods
from chainfed_ray.spec.parse import parse_job
from tests.project import ROOT

# --- cells ---------------------------------------------------------------------------------------------------------------


def a_study(
    *names: str, protocols: tuple[str, ...] = ("steps",), rates: tuple[Rates, ...] = (), **changes: Any
) -> Study:
    corpus = corpora.Corpus("toy", "builtin:docstrings", None, 64, 1200)
    settings: dict[str, Any] = {"alphas": (1.0,), "seeds": (0, 1)} | changes
    return Study(
        {"toy": corpus}, methods(6), "builtin:minilm", chosen=names, protocols=protocols, rates=rates, **settings
    )


def document(study: Study, method: str) -> dict[str, Any]:
    run = study.next(Cell("toy", 1.0, method, 0, "steps"), Rows(None))
    assert isinstance(run, Run)
    return run.document


def test_every_method_has_the_same_job_but_for_itself() -> None:
    study = a_study()
    for name, method in study.methods.items():
        spec = parse_job(document(study, name))
        assert spec.seed == 0
        assert spec.fleet.partition.alpha == 1
        assert [group.count for group in spec.fleet.clients] == [14, 6]
        assert spec.rounds.local_steps == 3
        assert spec.rounds.convergence.rule == "none"
        assert spec.rounds.total == (67 if method.part == "able" else 1 if method.kind in UNTRAINED else 40)
        assert spec.rounds.clients == (6 if method.part == "able" else 10)


def test_a_stage_is_evaluated_as_often_as_asked() -> None:
    asked = [parse_job(document(a_study(evaluate_every=every), "recommended")).evaluation for every in (None, 5)]
    assert [evaluation.every for evaluation in asked] == ["stage", 5]


def test_the_recommended_method_is_a_job_s_own_defaults() -> None:
    plain = {
        "name": "x",
        "model": {"base": "m"},
        "data": {"train": "d"},
        "fleet": {"clients": [{"name": "a", "memory": "1MiB"}]},
    }
    defaults = parse_job({**plain, "rounds": {"clients": 1}})
    spec = parse_job(document(a_study(), "recommended"))
    assert spec.chain == defaults.chain
    assert spec.aggregation == defaults.aggregation
    assert spec.rounds.learning_rate == defaults.rounds.learning_rate


def test_the_recipe_may_have_other_rates_for_another_base_model() -> None:
    others = {name: method.rates for name, method in methods(6, (0.03, 0.002)).items()}
    own = {name: method.rates for name, method in methods(6).items()}
    for name, rates in others.items():
        assert rates == ((0.03, 0.002) if name.startswith("recommended") else own[name])
    study = replace(a_study(), methods=methods(6, (0.03, 0.002)))
    rounds = document(study, "recommended-start-1")["rounds"]
    assert (rounds["learning_rate"], rounds["head_learning_rate"]) == (0.03, 0.002)


def test_what_a_cell_needs_comes_before_it() -> None:
    study = a_study("chain-staged", protocols=PROTOCOLS)
    order = study.with_needs()
    assert len(order) == len(set(order)) == 2 * (len(PROTOCOLS) + 1)
    for place, cell in enumerate(order):
        assert set(study.needs(cell)) <= set(order[:place])


def test_tuning_never_looks_at_the_test_split() -> None:
    study = a_study("none", "probe", "chain-staged", rates=((1e-3, 0.1), (1e-2, 0.3)), protocols=PROTOCOLS)
    cells = study.with_needs()
    assert {cell.method for cell in cells} == {"probe", "chain-staged"}
    assert len(cells) == 2 * 2 * 2
    for cell in cells:
        run = study.next(cell, Rows(None))
        assert isinstance(run, Run)
        assert not run.tested
        assert run.document["rounds"]["learning_rate"] == (cell.rates or (0, 0))[0]


# --- the rows, with runs that take no time -------------------------------------------------------------------------------


class FakeRunner:
    """What a run would come to: half a second a step, and 2 % better with each ten rounds."""

    def __init__(self, failing: Callable[[Run], bool] = lambda run: False) -> None:
        self.runs: list[Run] = []
        self.stopped = False
        self._failing, self._lock = failing, Lock()

    def __call__(self, run: Run) -> dict[str, Any]:
        with self._lock:
            self.runs.append(run)
        if self._failing(run):
            raise RunFailed("it was meant to")
        rounds = run.document["rounds"]["total"] if run.kind != "none" else 0
        cost = 0.5 if run.document["chain"].get("window") == 6 else 0.1
        steps = rounds * 3 * run.document["rounds"]["clients"]
        curve = [
            [
                steps * part // 4,
                cost * steps * part / 4,
                100 * steps * part // 4,
                float(part),
                0.5 + 0.002 * rounds * part / 4,
            ]
            for part in range(1, 5)
        ]
        return {
            "accuracy": 0.4 + 0.002 * rounds + 0.01 * run.document["seed"] if run.tested else None,
            "validation_accuracy": curve[-1][4],
            "rounds": rounds,
            "client_steps": steps,
            "client_cpu_seconds": cost * steps,
            "bytes_sent": 100 * steps,
            "seconds": 4.0,
            "step_cpu_seconds": cost,
            "bytes_per_round": 3000.0,
            "start_layer": 2,
            "curve": curve,
        }

    def stop(self) -> None:
        self.stopped = True


def made(
    study: Study, file: Path | None = None, runner: FakeRunner | None = None, jobs: int = 1
) -> tuple[Rows, list[str]]:
    said: list[str] = []
    rows = Rows(file)
    complete(study, rows, runner or FakeRunner(), jobs, said.append)
    return rows, said


def row(study: Study, rows: Rows, method: str, protocol: str, seed: int = 0) -> Row:
    found = rows.find(study.key(Cell("toy", 1.0, method, seed, protocol)))
    assert found
    return found


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_protocol(jobs: int) -> None:
    study = a_study(END_TO_END, "chain-staged", "none", protocols=PROTOCOLS)
    runner = FakeRunner()
    rows, said = made(study, runner=runner, jobs=jobs)
    assert row(study, rows, "chain-staged", "steps").rounds == 40
    assert row(study, rows, "chain-staged", "compute").rounds == 200
    assert row(study, rows, "chain-staged", "half-compute").rounds == 100
    assert row(study, rows, "chain-staged", "bytes").rounds == 40
    assert row(study, rows, END_TO_END, "compute").rounds == 40
    target = row(study, rows, "chain-staged", "target")
    # What end-to-end reaches, the chain has at the first point of its 200 rounds.
    assert (target.accuracy, target.client_steps) == (pytest.approx(0.58), 1500)
    nothing = row(study, rows, "none", "target")
    assert (nothing.accuracy, nothing.client_steps, nothing.bytes_sent) == (None, None, None)
    # Equal runs are made once: end-to-end at equal compute and bytes, the chain at equal bytes, and no training at all.
    assert len(runner.runs) == 2 * (2 + 3 + 1)
    assert len(said) == 2 * 3 * len(PROTOCOLS)
    assert "0 cells left" in said[-1]


def test_two_names_for_one_run() -> None:
    runner = FakeRunner()
    study = a_study("start-0", "no-foat", "start-4", "last-window", seeds=(0,))
    rows, _ = made(study, runner=runner, jobs=4)
    assert len(runner.runs) == 2
    assert row(study, rows, "no-foat", "steps").accuracy == row(study, rows, "start-0", "steps").accuracy


def test_a_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    study = a_study(END_TO_END, "chain-staged", protocols=("steps", "compute"))
    made(a_study("chain-staged", seeds=(1,)), file)
    runner = FakeRunner()
    made(study, file, runner)
    assert len(runner.runs) == 2 + 1 + 2
    again = FakeRunner()
    rows, said = made(study, file, again)
    assert (again.runs, said) == ([], [])
    written = json.loads(file.read_text())
    assert len(written) == 8
    wanted = {
        "dataset",
        "alpha",
        "method",
        "seed",
        "protocol",
        "accuracy",
        "client_steps",
        "client_cpu_seconds",
        "bytes_sent",
    }
    assert all(wanted <= each.keys() for each in written)
    assert str(ROOT) not in file.read_text()
    assert [asdict(each) for each in Rows(file).all] == [asdict(each) for each in rows.all]


@pytest.mark.parametrize(
    "other",
    [
        a_study("chain-staged", client_steps=600),
        a_study("chain-staged", rates=((3e-3, 0.1),)),
        a_study("chain-staged", alphas=(None,)),
        a_study("chain-staged", seeds=(2, 3)),
        a_study("chain-staged", evaluate_every=5),
    ],
)
def test_rows_of_other_options_are_others(tmp_path: Path, other: Study) -> None:
    made(a_study("chain-staged"), tmp_path / "rows.json")
    runner = FakeRunner()
    made(other, tmp_path / "rows.json", runner)
    assert len(runner.runs) == 2


def test_a_cell_that_fails_costs_itself_and_those_that_need_it(tmp_path: Path) -> None:
    study = a_study("chain-staged", "chain-cyclic", protocols=("steps", "compute"), seeds=(0,))
    runner = FakeRunner(lambda run: run.document["chain"].get("schedule") == "cyclic")
    _, said = made(study, tmp_path / "rows.json", runner)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(each["method"], each["protocol"]) for each in rows] == [
        ("chain-staged", "steps"),
        (END_TO_END, "steps"),
        ("chain-staged", "compute"),
    ]
    assert sum("failed: it was meant to" in sentence for sentence in said) == 1
    assert sum("failed: it needs" in sentence for sentence in said) == 1


def test_an_interruption_ends_what_is_being_made() -> None:
    def interrupted(run: Run) -> bool:
        raise KeyboardInterrupt

    runner = FakeRunner(interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(a_study("chain-staged"), runner=runner)
    assert runner.stopped


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for text in ('{"a": 1}', "[1]", '[{"dataset": "toy"}]', "not json"):
        file.write_text(text)
        with pytest.raises(NotOurRows, match=r"rows\.json does not hold rows"):
            Rows(file)
        assert file.read_text() == text


# --- what is printed -----------------------------------------------------------------------------------------------------


def printed(table: Any) -> list[str]:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def test_means_spreads_and_differences_paired_by_seed() -> None:
    study = a_study("chain-staged", "start-2", "start-3", END_TO_END, protocols=("compute", "target"))
    rows, _ = made(study)
    cells = [rows.find(study.key(cell)) for cell in study.cells()]
    found = [each for each in cells if each]
    references = {("toy", 1.0, seed): row(study, rows, END_TO_END, "steps", seed) for seed in (0, 1)}
    lines = printed(results(found, study.chosen, references))
    assert lines[1] == "toy 1 compute chain-staged 80.5 ± 0.7 +32.0 ± 0.0 2 6000 1.00× 5.00× 4"
    assert lines[4] == "toy 1 compute end-to-end 48.5 ± 0.7 +0.0 ± 0.0 2 1200 1.00× 1.00× 4"
    assert lines[5] == "toy 1 target chain-staged 58.0 ± 0.0 2/2 1500 0.25× 1.25× 1"
    assert regrets(found) == [
        "toy 1, equal compute: chain-staged starts at layer 2: 80.5; start-2, the best of 2 fixed starts: 80.5; "
        "regret 0.0 points"
    ]


def test_what_tuning_prints() -> None:
    study = a_study("chain-staged", rates=((1e-3, 0.1), (1e-2, 0.3)))
    rows, _ = made(study)
    found = [each for each in (rows.find(study.key(cell)) for cell in study.cells()) if each]
    assert printed(tuning(found, study.chosen))[1:] == [
        "toy 1 steps chain-staged 0.001 0.1 58.0 ± 0.0 2",
        "toy 1 steps chain-staged 0.01 0.3 58.0 ± 0.0 2",
    ]


# --- data, and the real thing --------------------------------------------------------------------------------------------


def test_data_of_one_s_own(tmp_path: Path) -> None:
    with pytest.raises(corpora.NoCorpus, match="does not exist"):
        corpora.at(tmp_path / "nothing")
    (tmp_path / "train.csv").touch()
    with pytest.raises(corpora.NoCorpus, match=r"a folder without test\.jsonl or test\.csv or test\.parquet"):
        corpora.at(tmp_path)
    (tmp_path / "test.parquet").touch()
    corpus = corpora.at(tmp_path)
    assert corpus.name == tmp_path.name
    assert corpus.sources == {"train": f"path:{tmp_path / 'train.csv'}", "test": f"path:{tmp_path / 'test.parquet'}"}


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Rows of three classes in a folder with a training and a test file."""
    folder = tmp_path_factory.mktemp("corpora") / "toy"
    folder.mkdir()
    (folder / "train.jsonl").write_text(tiny_data.read_text())
    (folder / "test.jsonl").write_text("\n".join(tiny_data.read_text().splitlines()[:30]))
    return folder


@pytest.mark.slow
def test_killed_and_run_again(tmp_path: Path, toy: Path, tiny_model_folder: Path) -> None:
    """Real runs on a tiny model, one at a time: interrupted after the first row, so in the second run, and gone on with."""
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "accuracy",
        "--data",
        str(toy),
        "--base",
        f"path:{tiny_model_folder}",
    ]
    command += ["--alphas", "iid", "--seeds", "0", "--client-steps", "40", "--protocols", "steps"]
    command += ["--methods", "end-to-end", "last-window", "--jobs", "1"]
    command += ["--json", str(tmp_path / "rows.json"), "--scratch", str(tmp_path)]
    root = ROOT
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr
        assert "toy IID seed 0" in first.stderr.readline()
        first.send_signal(signal.SIGTERM)  # as Ctrl-C, which a test in the background does not get
        try:
            _, said = first.communicate(timeout=120)
        finally:
            first.kill()  # or nobody would learn that it hangs
    assert first.returncode == 1
    assert "run the command again with the same --json" in said
    before = json.loads((tmp_path / "rows.json").read_text())
    assert len(before) == 1
    assert not list(tmp_path.glob("accuracy-*"))

    again = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("toy IID") == 1
    after = json.loads((tmp_path / "rows.json").read_text())
    assert after[:1] == before
    assert len(after) == 2
    assert "training the whole model in plain PyTorch takes" in again.stdout
    assert "narrowest window of a client: end-to-end 4, last-window 2" in again.stdout
