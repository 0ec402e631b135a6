"""Promise: what is learnt is what the file says. A cell is read as what it is, in every form, or refused with its row."""

import codecs
import csv
import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chainfed_ray.data.cells import labels, texts
from chainfed_ray.data.sources import load, read_table
from chainfed_ray.data.tables import Number, Table, read_path
from chainfed_ray.errors import InvalidJob
from chainfed_ray.spec.sections import DataSpec

Rows = list[dict[str, Any]]

# Characters that files and terminals handle each in their own way; a lone surrogate is no text in any of the forms.
_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=20).filter(str.strip)


def write_delimited(path: Path, rows: Rows, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path: Path, rows: Rows) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


FORMS: dict[str, Callable[[Path, Rows], None]] = {
    "rows.csv": lambda path, rows: write_delimited(path, rows, ","),
    "ROWS.CSV": lambda path, rows: write_delimited(path, rows, ","),
    "rows.tsv": lambda path, rows: write_delimited(path, rows, "\t"),
    "rows.jsonl": write_lines,
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "array.jsonl": lambda path, rows: path.write_text(json.dumps(rows)),
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
@given(rows=st.lists(st.fixed_dictionaries({"text": _TEXT, "label": _TEXT}), min_size=1, max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
def test_every_form_keeps_every_character(name: str, rows: Rows, tmp_path: Path) -> None:
    FORMS[name](tmp_path / name, rows)
    table = read_path(tmp_path / name)
    assert table.columns == {key: [row[key] for row in rows] for key in ("text", "label")}
    if not name.endswith(".parquet"):
        marked = tmp_path / f"marked{Path(name).suffix}"
        marked.write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
        assert read_path(marked).columns == table.columns, "a byte order mark is no part of a text"
        other = tmp_path / f"other{Path(name).suffix}"
        other.write_text((tmp_path / name).read_bytes().decode(), encoding="utf-16", newline="")
        assert read_path(other).columns == table.columns
        packed = tmp_path / f"packed{Path(name).suffix}.gz"
        packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert read_path(packed, {"label"}).columns == {"label": table.columns["label"]}
        assert read_path(packed, {"label"}).names == table.names


def test_a_folder_of_shards_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, first in (("b.parquet", 2), ("a.parquet", 0)):
        FORMS["rows.parquet"](tmp_path / name, [{"text": str(first)}, {"text": str(first + 1)}])
    (tmp_path / "README").write_text("no rows")
    (tmp_path / "._a.parquet").write_bytes(b"of macOS")
    assert read_path(tmp_path).columns == {"text": ["0", "1", "2", "3"]}
    write_lines(tmp_path / "c.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match=r"files of one form; it has \.jsonl, \.parquet"):
        read_path(tmp_path)


def test_a_folder_of_arrow_files_is_refused_by_what_it_is(tmp_path: Path) -> None:
    """Beside its rows, ``save_to_disk`` writes two files of JSON, which are no rows."""
    for name in ("dataset_info.json", "state.json", "data-00000-of-00001.arrow"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"this folder has Arrow files, of save_to_disk"):
        read_path(tmp_path)


def test_objects_of_a_parquet_file_have_the_keys_that_have_a_value(tmp_path: Path) -> None:
    """Arrow gives each of them the keys of all others: a tool would be called with arguments that nobody gave."""
    calls = [[{"name": "f", "of": {"city": "Bonn"}}], [{"name": "g", "of": {"day": 3}}]]
    written = [[{"name": "f", "of": {"city": "Bonn", "day": None}}], calls[1]]
    pairs = pa.array([[("city", "Bonn")], []], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"calls": calls, "written": written, "pairs": pairs}), tmp_path / "rows.parquet")
    assert read_path(tmp_path / "rows.parquet").columns == {
        "calls": calls,
        "written": calls,
        "pairs": [{"city": "Bonn"}, {}],
    }


@pytest.mark.parametrize(
    ("kind", "values", "key"),
    [
        (pa.map_(pa.string(), pa.int64()), [[("a", 1)], None, [("a", 1), ("b", 2), ("a", 2)]], '"a"'),
        (pa.map_(pa.int64(), pa.int64()), [[], [(0, 1)], [(0, 1), (0, 2)]], "0"),
        (
            pa.list_(pa.struct([("of", pa.map_(pa.string(), pa.map_(pa.string(), pa.int64())))])),
            [[], None, [{"of": None}, {"of": [("b", [("a", 1), ("a", 2)])]}]],
            '"a"',
        ),
    ],
)
def test_a_map_of_a_parquet_file_with_a_key_twice_is_refused_by_its_row(
    kind: pa.DataType, values: list[Any], key: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"pairs": pa.array(values, kind)}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=rf"^maps that have each key once; row 3 of pairs has {key} twice$"):
        read_path(tmp_path / "rows.parquet")


def test_bytes_of_a_parquet_file_that_are_no_text_are_refused_by_their_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"caf\xe9"]).view(pa.string())}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"texts in UTF-8; those of the column text are not \("):
        read_path(tmp_path / "rows.parquet")


def test_shards_have_the_same_columns(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    write_lines(tmp_path / "b.jsonl", [{"texts": "x"}])
    with pytest.raises(ValueError, match=r"the same columns; those of b\.jsonl and a\.jsonl differ"):
        read_path(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "rows.csv",
            "text,label\na, b,x\n",
            "2 fields on every line, as in the header; line 2 has 3 .*a text with a comma",
        ),
        ("rows.csv", "text,label\na,x,\nb,y,\n", "line 2 has 3"),
        ("rows.csv", "text,label\na,x\n\nb\n", "line 4 has 1"),
        ("rows.csv", "text,text\na,b\n", "names each column once; 'text' is there twice"),
        ("rows.csv", "", "the file is empty"),
        ("rows.csv", 'text,label\n"open', "fields as CSV has them; line 2"),
        ("rows.tsv", "text\tlabel\na\tb\tc\n", "line 2 has 3 .*a text with a tab"),
        ("rows.jsonl", '{"text": "a"}\n{"text": \n', "an object on each line or one array of objects; line 2"),
        ("rows.jsonl", '{\n "text": "a"\n}', "line 1"),
        ("rows.jsonl", '\n \r\n  {"text": \n', "line 3"),
        ("rows.jsonl", '{"text": "a"}\n["b"]', r'an object for each row; row 2 is \["b"\]'),
        ("rows.json", '[{"text": "a"}', "the array"),
        ("rows.jsonl", '{"text": "a"}\n{"b": NaN}', "line 2: NaN is no number that JSON has"),
        ("rows.jsonl", "[" * 100_000, "the array: .*recursion"),
        ("rows.jsonl", '{"text": "a", "c": {"text": "b", "text": "c"}}', "line 1: the key 'text' is given twice"),
        ("rows.jsonl", '{"text": ["a", {"b": "\\ud800"}]}', "line 1: a text has half a surrogate pair"),
        ("rows.csv", "text,label".encode("utf-32"), "text in UTF-8; this file is UTF-32"),
        ("rows.jsonl", codecs.BOM_UTF32_BE + "{}".encode("utf-32-be"), "text in UTF-8; this file is UTF-32"),
        ("rows.csv", "text,label".encode("utf-16-le"), "this file is in UTF-16 without a byte order mark"),
        ("rows.csv", b"\xff\xffa", "text in UTF-8, or in UTF-16 with a byte order mark"),
        ("rows.csv", "text,label\na,x\n\ufefftext,label\n", "one header, on the first line; line 3 has it again"),
        ("rows.csv", b"PK\x03\x04", "a ZIP archive or an Excel workbook"),
        ("rows.jsonl", gzip.compress(b"{}", mtime=0), "its name does not end in .gz"),
        ("rows.json", b"PAR1", "a Parquet file, whose name ends in .parquet"),
        ("rows.csv.gz", b"no gzip at all", "a readable .csv"),
        ("rows.parquet", b"PAR1", "a Parquet file that can be read"),
        ("rows.jsonl", "version https://git-lfs.github.com/spec/v1\noid x", "a pointer of git-lfs"),
        ("rows.txt", "", r"a \.csv, \.tsv, \.jsonl, \.json or \.parquet file"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused_by_its_line(
    name: str, content: str | bytes, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidJob, match=rf"(?is)data\.train is 'path:.*'; expected .*{expected}"):
        read_table("data.train", f"path:{path}", "train")


def column(*cells: Any) -> Table:
    return Table(("c",), {"c": cells})


def test_a_number_stands_as_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"c": 1}\n{"c": null}\n{"c": 9007199254740993}\n{"c": 1.50}\n{"c": 1e5}\n{"c": "x"}\n{"c": -0}\n{"c": '
        + "9" * 5000
        + "}"
    )
    table = read_path(tmp_path / "rows.jsonl")
    written = ["1", None, "9007199254740993", "1.50", "1e5", "x", "-0", "9" * 5000]
    assert texts(table, "data.response", "c", "rows") == written
    short = pa.array([0.1, 1.0], pa.float32())
    pq.write_table(pa.table({"c": short, "d": [Decimal("1.50"), Decimal("0E-2")]}), tmp_path / "rows.parquet")
    table = read_path(tmp_path / "rows.parquet")
    assert [texts(table, "data.text", name, "rows") for name in "cd"] == [["0.1", "1.0"], ["1.50", "0.00"]]


@pytest.mark.parametrize(
    ("cell", "holds"),
    [
        (["a", "b"], r'a list: \["a", "b"\]'),
        ({"en": "a"}, r'an object: {"en": "a"}'),
        (True, "a truth value: true"),
        (b"a", "bytes: .*"),
        (["word"] * 100, ".*…"),
    ],
)
def test_what_is_no_text_is_refused_with_its_row(cell: Any, holds: str) -> None:
    with pytest.raises(
        InvalidJob, match=rf"data\.text is 'c'; expected a text in every row of rows; row 2 holds {holds}$"
    ):
        texts(column("a", cell), "data.text", "c", "rows")


def test_truth_values_may_be_classes_and_kinds_are_not_mixed() -> None:
    assert labels(column(True, False, None), "data.label", "c", "rows") == ["true", "false", None]
    for cells, words in (
        ((1, True), "row 2 holds a truth value, rows before it a number"),
        (("1", 1), "row 2 holds a number"),
    ):
        with pytest.raises(InvalidJob, match=f"values of one kind in every row of rows; {words}"):
            labels(column(*cells), "data.label", "c", "rows")


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (("pos", "neg", "pos "), "row 3 has 'pos ', rows before it 'pos'"),
        (("caf\u00e9", "cafe\u0301"), r"row 2 has 'cafe\\u0301', rows before it 'caf\\xe9'"),
        (("pos", "po\u200bs"), r"row 2 has 'po\\u200bs'"),
        ((1, 2, 1.0), "numbers written in one way in rows; row 3 has '1.0', rows before it '1'"),
        (("a", "b\0"), "names without null characters in rows; row 2"),
        ((1, Number("1e9999999999999999999")), "numbers of at most 18 digits in their exponent in rows; row 2"),
    ],
)
def test_classes_that_look_alike_are_refused(cells: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InvalidJob, match=words):
        labels(column(*cells), "data.label", "c", "rows")


def test_classes_that_people_tell_apart_are_classes() -> None:
    """Joiners and tags make other pictures, and other words."""
    family, people = "\U0001f468\u200d\U0001f469", "\U0001f468\U0001f469"
    england, scotland = "\U0001f3f4\U000e0067\U000e007f", "\U0001f3f4\U000e0073\U000e007f"
    cells = [family, people, england, scotland, "می‌خواهم", "میخواهم"]
    assert labels(column(*cells), "data.label", "c", "rows") == cells


def test_a_parquet_file_has_the_names_of_its_classes(tmp_path: Path) -> None:
    """They stand in the metadata that Hugging Face writes; a class without a name stays a number."""
    table = pa.table({"label": [0, 1, -1], "text": ["a", "b", "c"]})

    def written(names: list[str]) -> Path:
        label = {"names": names, "_type": "ClassLabel"}
        features = {"info": {"features": {"turns": [{"_type": "Value"}], "label": label}}}
        path = tmp_path / "rows.parquet"
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
        return path

    assert read_path(written(["neg", "pos"])).columns["label"] == ["neg", "pos", -1]
    with pytest.raises(ValueError, match="names of classes that differ; its metadata call two of label 'pos'"):
        read_path(written(["pos", "pos"]))


@given(seed=st.integers(0, 10_000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_every_class_keeps_a_row_to_be_learnt_from(seed: int, tmp_path: Path) -> None:
    """With a few large classes and many of two rows, of which the held-out rows could take both."""
    names = [f"c{row % 4}" for row in range(160)] + [f"r{row % 20}" for row in range(40)]
    write_lines(tmp_path / "rows.jsonl", [{"text": f"row {row}", "label": name} for row, name in enumerate(names)])
    corpus = load(DataSpec(train=f"path:{tmp_path / 'rows.jsonl'}"), seed)
    assert set(corpus.train.labels) == set(names)
    assert [len(split) for _, split in corpus.splits] == [160, 20, 20]
    assert sorted(text for _, split in corpus.splits for text in split.texts) == sorted(
        f"row {row}" for row in range(200)
    )


@pytest.mark.parametrize("names", [["a", "a.b", "m", "m.list.element.role"], ["m.list.element.role", "m", "a.b", "a"]])
def test_a_column_of_a_parquet_file_is_whole_whatever_others_are_called(names: list[str], tmp_path: Path) -> None:
    """Arrow takes a name with a dot for a path as well."""
    message = {"role": "user", "content": "x"}
    row = {"a": {"b": 1, "c": "x"}, "a.b": "p", "m": [message], "m.list.element.role": "q"}
    pq.write_table(pa.table({name: [row[name]] for name in names}), tmp_path / "rows.parquet")
    for wanted in (None, *names):
        table = read_path(tmp_path / "rows.parquet", wanted and {wanted})
        kept = names if wanted is None else [wanted]
        assert (table.names, table.columns) == (tuple(names), {name: [row[name]] for name in kept})


def test_labels_of_a_large_parquet_file_are_kept_once(tmp_path: Path) -> None:
    """Of three million short rows they took as much memory as the texts."""
    count = 40_000
    names = ["neg", "pos", None]
    rows = {"text": [f"row {row}" for row in range(count)], "label": [names[row % 3] for row in range(count)]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet", row_group_size=15_000)
    table = read_path(tmp_path / "rows.parquet")
    assert table.columns == rows
    assert len({id(cell) for cell in table.columns["label"]}) == 3
    assert table.names == ("text", "label")
