"""Where rows and models come from: every form gives the same rows, and what cannot be read is refused in words."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chainfed_ray.data import docstrings
from chainfed_ray.data.sources import load, read_table
from chainfed_ray.errors import InvalidJob
from chainfed_ray.hub import resolve
from chainfed_ray.spec.sections import DataSpec
from tests.builders import ROWS, rows_in


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "hub"])
def test_every_form_gives_the_same_rows(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    corpus = load(DataSpec(train=rows_in(tmp_path, form)), seed=5)
    assert corpus.classes == ("a", "b")
    assert [len(split) for split in (corpus.train, corpus.validation, corpus.test)] == [32, 4, 4]
    found = [
        {"text": text, "label": label}
        for split in (corpus.train, corpus.validation, corpus.test)
        for text, label in zip(split.texts, split.labels, strict=True)
    ]
    assert sorted(found, key=lambda row: row["text"]) == sorted(ROWS, key=lambda row: row["text"])


def test_a_configuration_of_a_data_set_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    configurations = [
        f"- config_name: {name}\n  data_files: [{{split: train, path: {name}.csv}}]" for name in ("some", "all")
    ]
    (tmp_path / "README.md").write_text("\n".join(["---", "configs:", *configurations, "---"]))
    pd.DataFrame(ROWS[:20]).to_csv(tmp_path / "some.csv", index=False)
    pd.DataFrame(ROWS).to_csv(tmp_path / "all.csv", index=False)
    for name, count in (("some", 20), ("all", 40)):
        corpus = load(DataSpec(train=f"hf:{tmp_path}:{name}"), seed=5)
        assert sum(len(split) for split in (corpus.train, corpus.validation, corpus.test)) == count
    with pytest.raises(InvalidJob, match=r"a data set on the hub with a train split \(.*some"):
        load(DataSpec(train=f"hf:{tmp_path}:none"), seed=5)


def test_splits_of_their_own(tmp_path: Path) -> None:
    source = rows_in(tmp_path, "csv")
    corpus = load(DataSpec(train=source, validation=source, test=source), seed=5)
    assert [len(split) for split in (corpus.train, corpus.validation, corpus.test)] == [40, 40, 40]


@pytest.mark.parametrize(
    ("rows", "changes", "complaint"),
    [
        (ROWS, {"label": "topic"}, r"data.label is 'topic'; expected a column of path:\S+: text, label"),
        (ROWS, {"text": "body"}, "data.text is 'body'; expected a column"),
        (
            [{f"c{place}": 1 for place in range(50_000)}],
            {},
            r"expected a column of path:\S+: c0, c1, .*, c9 and 49990 more$",
        ),
        (ROWS[:9], {}, "data.train is .*; expected 10 rows or more; there are 9"),
        ([], {}, r"data\.train is .*; expected one row or more; there are none"),
        ([{"text": "x", "label": "a"}] * 12, {}, "data.label is 'label'; expected two classes or more"),
        ([*ROWS, {"text": "x", "label": None}], {}, "data.label is 'label'; .* row 41 has none"),
        ([*ROWS[:3], {"text": "  ", "label": "a"}, *ROWS], {}, "data.text is 'text'; .* row 4 has none"),
    ],
)
def test_rows_that_cannot_be_used(
    rows: list[dict[str, Any]], changes: dict[str, str], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(InvalidJob, match=complaint):
        load(DataSpec(train=f"path:{path}", **changes), seed=0)


def test_a_text_that_no_tokenizer_can_hold_is_refused_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "short,x\n" * 20 + "word " * 2_000_001 + ",y\n")
    with pytest.raises(InvalidJob, match=r"data\.text is .*texts of at most 10,000,000 .*row 21 of .*10,000,005"):
        load(DataSpec(train=f"path:{path}"), seed=0)


def test_the_cost_of_a_header_is_linear_in_its_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",".join(f"column {place}" for place in range(60_000)) + "\n")
    started = monotonic()
    with pytest.raises(InvalidJob, match=r"a column of path:.*: column 0, column 1, .* and 59990 more"):
        load(DataSpec(train=f"path:{path}"), seed=0)
    assert monotonic() - started < 10, "not minutes"


def test_labels_that_training_does_not_know(tmp_path: Path) -> None:
    other = tmp_path / "test.jsonl"
    other.write_text('{"text": "x", "label": "c"}')
    with pytest.raises(InvalidJob, match=r"data\.test is 'c'; expected only labels that the training rows have"):
        load(DataSpec(train=rows_in(tmp_path, "csv"), test=f"path:{other}"), seed=0)


def test_labels_that_a_split_hides_are_said_to_be_hidden(tmp_path: Path) -> None:
    """As on the hub, where tests are: -1 has no name among the classes, which stand in the metadata of the file."""
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["neg", "pos"]}}}}
    for name, shown in (("train", [0, 1] * 10), ("test", [-1] * 10)):
        table = pa.table({"text": ["x"] * len(shown), "label": shown})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    spec = DataSpec(train=f"path:{tmp_path}/train.parquet", test=f"path:{tmp_path}/test.parquet")
    with pytest.raises(InvalidJob, match=r"data\.test is '-1'; .*those of this split seem to be hidden"):
        load(spec, seed=0)


def test_a_split_that_is_drawn_leaves_each_class_a_row_to_learn_from(tmp_path: Path) -> None:
    rows = [{"text": f"a row {row}", "label": f"common {row % 3}"} for row in range(90)]
    rows += [{"text": f"a rare row {row}", "label": f"rare {row % 30}"} for row in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    for seed in range(40):
        corpus = load(DataSpec(train=f"path:{path}"), seed=seed)
        assert len(set(corpus.train.labels)) == 33
        assert (len(corpus.validation), len(corpus.test)) == (15, 15)


def test_a_hub_out_of_reach_is_an_error_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = monotonic()
    with pytest.raises(InvalidJob, match=r"model\.base is 'hf:org/model'; expected a network"):
        resolve("hf:org/model")
    with pytest.raises(InvalidJob, match=r"data\.train is 'hf:org/rows'; expected a network"):
        load(DataSpec(train="hf:org/rows"), seed=0)
    assert monotonic() - started < 30, "not the minutes of retries that it takes otherwise"


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ([], "a folder with a config.json"),
        (["config.json"], "a folder with safetensors weights"),
        (["config.json", "pytorch_model.bin"], r"pytorch_model\.bin is a pickle"),
        (None, "a folder that exists"),
    ],
)
def test_models_that_cannot_be_used(files: list[str] | None, complaint: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    with pytest.raises(InvalidJob, match=complaint):
        resolve(f"path:{folder}")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("rows.csv", "config.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(InvalidJob, match=r"data\.train .* and no pipe or device"):
        read_table("data.train", f"path:{tmp_path / 'rows.csv'}", "train")
    with pytest.raises(InvalidJob, match=r"model\.base .*; config\.json is neither a file nor a folder"):
        resolve(f"path:{tmp_path}")


@pytest.mark.slow
def test_the_built_in_rows_are_the_same_in_every_process() -> None:
    """Whatever the order in which that has its sets: a process with another seed for hashes than this one."""
    program = "import hashlib; from chainfed_ray.data.docstrings import rows; "
    program += "print(hashlib.sha256(repr(rows()).encode()).hexdigest())"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    there = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert there == hashlib.sha256(repr(docstrings.rows()).encode()).hexdigest()
