"""Reads tables from files as what they hold: a cell keeps its value, and a row that does not fit is an error with its line."""

import codecs
import csv
import gzip
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from chainfed_ray.reading import LFS_POINTER, data_file, data_path, first_repeated, uploaded

FORMS = ".csv, .tsv, .jsonl, .json or .parquet file (text files may be .gz), or a folder of such files of one form"
_PARQUET = b"PAR1"  # a Parquet file ends so as well
# How files begin that are not what their names say.
_OTHERS = {
    LFS_POINTER: "the file itself; this is a pointer of git-lfs (`git lfs pull` fetches it)",
    b"PK\x03\x04": "rows; this is a ZIP archive or an Excel workbook, which can be saved as .csv",
    _PARQUET: "rows as text; this is a Parquet file, whose name ends in .parquet",
    b"\x1f\x8b": "rows as text; this file is packed, and its name does not end in .gz",
}
_AT_ONCE, _FEW = 2**14, 1000  # cells that are taken from Arrow; different texts, of which each is kept once
_MOST_DIGITS = 4000  # of a whole number that Python reads as one
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # one half of a surrogate pair, as JSON may write it


class Number(float):
    """A number that is written as it stands in the file: with a fraction, an exponent or thousands of digits, or ``-0``."""

    def __new__(cls, written: str) -> "Number":
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str

    def __str__(self) -> str:
        return self.written

    def __reduce__(self) -> tuple[Any, ...]:
        return Number, (self.written,)


@dataclass(frozen=True)
class Table:
    """Rows by column. ``names`` are all columns of the source, of which ``columns`` may hold only those that were asked for.

    A cell is what the file holds: a text, a number, a truth value, a list or a dict; None where a row has nothing.
    """

    names: tuple[str, ...]
    columns: dict[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def read_path(path: Path, wanted: Collection[str] | None = None) -> Table:
    """The rows of a file, or of all files of a folder in the order of their names; of the ``wanted`` columns, or of all.

    Raises:
        ValueError: the path has no known form, or what is in it is not of that form; in words that a user can act on.
        OSError: it cannot be read.
        NotAllowed: the rules of this process do not allow it.
    """
    path = data_path(path)
    if not path.exists():
        raise ValueError("a file or folder that exists")
    if not (path.is_file() or path.is_dir()):  # to open a pipe would wait for whoever writes into it
        raise ValueError("a file or folder, and no pipe or device")
    if not path.is_dir():
        return _read(path, wanted)
    everything = sorted(_files_in(path))
    if any(file.suffix == ".arrow" for file in everything):
        raise ValueError(
            "files of rows, as Dataset.to_parquet writes one; this folder has Arrow files, of save_to_disk"
        )
    files = [file for file in everything if _form(file) is not None]
    forms = {_form(file) for file in files}
    if len(forms) != 1:
        raise ValueError(f"a folder of files of one form; it has {', '.join(sorted(map(str, forms))) or 'none'}")
    tables = [(file, _read(file, wanted)) for file in files]
    first = tables[0][1]
    for file, table in tables:
        if set(table.names) != set(first.names):
            raise ValueError(f"files with the same columns; those of {file.name} and {files[0].name} differ")
    return Table(
        first.names, {name: [cell for _, table in tables for cell in table.columns[name]] for name in first.columns}
    )


def _files_in(folder: Path) -> Iterator[Path]:
    """The files of a folder, but those whose names begin with a dot: they are of what else writes into folders, such as macOS.

    Raises:
        NotAllowed: a link leads to where the rules of this process do not allow it, whether anything is there or not.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            file = folder / entry.name
            if entry.name.startswith("."):
                continue
            if data_path(file).is_file() if entry.is_symlink() else entry.is_file(follow_symlinks=False):
                yield file


def read_upload(upload: str, wanted: Collection[str] | None = None) -> Table:
    """The rows of a file that was sent to the service; of the ``wanted`` columns, or of all.

    Raises:
        ValueError: its name has no known form, or what is in it is not of that form; in words that a user can act on.
        OSError: it cannot be read.
        NotAllowed: this process may read no upload with this id.
    """
    name, path = uploaded(upload)
    form = _form(Path(name))
    if form is None:
        raise ValueError(f"a {FORMS}")
    return _read_as(form, path, name.lower().endswith(".gz"), wanted)


def from_arrow(table: pa.Table, wanted: Collection[str] | None = None) -> Table:
    """An Arrow table. Where its metadata name the classes of a column, as Hugging Face's do, a cell is its class's name.

    A class that has no name, such as the −1 of labels that are hidden, stays a number.

    Raises:
        ValueError: two classes have one name, or a map has a key twice.
    """
    classes = _class_names(table.schema.metadata or {})
    columns: dict[str, Sequence[Any]] = {}
    for name in table.column_names:
        if wanted is None or name in wanted:
            try:
                cells = _cells(table.column(name), name)
            except UnicodeDecodeError as error:
                raise ValueError(f"texts in UTF-8; those of the column {name} are not ({error.reason})") from None
            if name in classes:
                names = classes[name]
                if (twice := first_repeated(names)) is not None:
                    raise ValueError(f"names of classes that differ; its metadata call two of {name} {twice!r}")
                cells = [names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else cell for cell in cells]
            columns[name] = cells
    return Table(tuple(table.column_names), columns)


def _cells(column: pa.ChunkedArray, name: str) -> list[Any]:
    """The values of the column ``name``. Numbers of fewer bits than Python's keep the few digits that they have.

    Arrow gives all objects of a column the keys of each other, with nothing where one has no such key: those are left out. So
    are keys that were written with null, which it does not tell from them.

    Raises:
        ValueError: a map has a key twice.
    """
    if pa.types.is_float16(column.type) or pa.types.is_float32(column.type):
        written = column.cast(pa.string()).to_pylist()
        return [None if cell is None else Number(_with_point(cell)) for cell in written]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return _sharing(column)
    cells: list[Any] = column.to_pylist()
    if not pa.types.is_nested(column.type):
        return cells
    return [_with_own_keys(cell, column.type, f"row {row} of {name}") for row, cell in enumerate(cells, start=1)]


def _sharing(column: pa.ChunkedArray) -> list[str | None]:
    """The texts of a column, with one object for all cells that say the same if there are few, as in a column of labels."""
    known = dict[str | None, str | None]()
    parts = (column.slice(first, _AT_ONCE).to_pylist() for first in range(0, len(column), _AT_ONCE))
    return [known.setdefault(cell, cell) if len(known) <= _FEW else cell for part in parts for cell in part]


def _with_own_keys(value: Any, kind: pa.DataType, where: str) -> Any:
    """A value of Arrow's, with dicts for its maps: Arrow gives each as a list of pairs."""
    if not isinstance(value, dict | list):
        return value
    if pa.types.is_map(kind):
        if (twice := first_repeated(key for key, _ in value)) is not None:
            raise ValueError(f"maps that have each key once; {where} has {shown(twice)} twice")
        return {key: _with_own_keys(each, kind.item_type, where) for key, each in value if each is not None}
    if isinstance(value, dict) and pa.types.is_struct(kind):
        return {
            key: _with_own_keys(each, kind.field(key).type, where) for key, each in value.items() if each is not None
        }
    if isinstance(inner := getattr(kind, "value_type", None), pa.DataType):
        return [_with_own_keys(each, inner, where) for each in value]
    return value


def _with_point(written: str) -> str:
    """A number as Python writes it, which shows of a whole one that it need not be."""
    return f"{written}.0" if written.lstrip("-").isdecimal() else written


def _read(path: Path, wanted: Collection[str] | None) -> Table:
    form = _form(path)
    if form is None:
        raise ValueError(f"a {FORMS}")
    with data_file(path) as own:
        return _read_as(form, own, path.name.lower().endswith(".gz"), wanted)


def _read_as(form: str, path: Path, packed: bool, wanted: Collection[str] | None) -> Table:
    with path.open("rb") as file:
        begin = file.read(max(map(len, _OTHERS)))
        file.seek(-min(len(_PARQUET), path.stat().st_size), os.SEEK_END)
        end = file.read()
    own = b"\x1f\x8b" if packed else _PARQUET if form == ".parquet" else None
    for mark, expected in _OTHERS.items():
        if begin.startswith(mark) and mark != own and (mark != _PARQUET or end == _PARQUET):
            raise ValueError(expected)
    if form == ".parquet":
        return _parquet(path, wanted)
    with gzip.open(path, "rb") if packed else path.open("rb") as raw:
        # The encodings skip a byte order mark, as some editors and shells write it.
        mark = raw.read(4)
        if mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
            raise ValueError("text in UTF-8; this file is UTF-32")
        if b"\0" in mark[:2]:
            raise ValueError("text in UTF-8; this file is in UTF-16 without a byte order mark, or it is no text")
        encoding = "utf-16" if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        raw.seek(0)
        with io.TextIOWrapper(cast(IO[bytes], raw), encoding=encoding, newline="") as text:
            try:
                return _TEXT_READERS[form](text, wanted)
            except UnicodeDecodeError as error:
                where = f"{error.reason} at byte {error.start}"
                raise ValueError(f"text in UTF-8, or in UTF-16 with a byte order mark ({where})") from None


def _form(path: Path) -> str | None:
    """The suffix that says the form, whatever its case, also before a ``.gz``."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    form = Path(name.removesuffix(".gz")).suffix
    return form if form in _TEXT_READERS or (form == ".parquet" and not packed) else None


def _parquet(path: Path, wanted: Collection[str] | None) -> Table:
    try:
        with pq.ParquetFile(path) as file:
            names = tuple(file.schema_arrow.names)
            if (twice := first_repeated(names)) is not None:
                raise ValueError(f"a file that names each column once; {twice!r} is there twice")
            kept = [name for name in names if wanted is None or name in wanted]
            # One after the other, since Arrow's form of each is needed no more. For a name with a dot it gives parts of others.
            read = [from_arrow(file.read(columns=[name]), {name}).columns for name in kept]
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's trouble, not the file's
            raise
        raise ValueError(f"a Parquet file that can be read ({error})") from None
    return Table(names, {name: cells for columns in read for name, cells in columns.items()})


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The names of the classes of each column that has some, from Hugging Face's own entry in a schema's metadata."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    # A feature may be a list as well: of columns within a column.
    labels = {name: it for name, it in features if isinstance(it, dict) and it.get("_type") == "ClassLabel"}
    return {name: list(map(str, it["names"])) for name, it in labels.items() if isinstance(it.get("names"), list)}


def _delimited(text: TextIO, wanted: Collection[str] | None, delimiter: str) -> Table:
    csv.field_size_limit(2**31 - 1)  # a text may be long
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise ValueError("a header with the names of the columns; the file is empty")
        if twice := sorted(name for name, times in Counter(header).items() if times > 1):
            raise ValueError(f"a header that names each column once; {twice[0]!r} is there twice")
        kept = [(place, name) for place, name in enumerate(header) if wanted is None or name in wanted]
        columns: dict[str, list[Any]] = {name: [] for _, name in kept}
        for row in reader:
            if not row:
                continue  # an empty line
            if len(row) != len(header):
                fields = f"{len(header)} fields on every line, as in the header; line {reader.line_num} has {len(row)}"
                raise ValueError(f"{fields} (a text with a {_NAMES[delimiter]} goes in quotation marks)")
            if len(row) > 1 and [row[0].lstrip("\ufeff"), *row[1:]] == header:
                raise ValueError(f"one header, on the first line; line {reader.line_num} has it again")
            for place, name in kept:
                columns[name].append(row[place])
    except csv.Error as error:
        raise ValueError(f"fields as CSV has them; line {reader.line_num}: {error}") from None
    return Table(tuple(header), dict(columns))


_NAMES = {",": "comma", "\t": "tab"}


def _json(text: TextIO, wanted: Collection[str] | None) -> Table:
    """JSON: an object on each line, or one array of objects."""
    before = ""
    while (begin := text.read(1)).isspace():
        before += begin
    if begin == "[":
        return _rows(enumerate(_parsed("[" + text.read(), "the array"), start=1), wanted)
    return _rows(_lines(text, begin, len((before + begin).splitlines()) - 1), wanted)


def _lines(text: TextIO, begin: str, before: int) -> Iterator[tuple[int, Any]]:
    """The number and the value of each row. Of its line ``begin`` was read already, and ``before`` it so many empty ones."""
    for number, line in enumerate(text, start=before + 1):
        line = begin + line if number == before + 1 else line
        if line.strip():
            yield number, _parsed(line, f"line {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return parsed_json(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"JSON, an object on each line or one array of objects; {where}: {reason}") from None


def parsed_json(text: str) -> Any:
    """What a JSON text says, if it says it once: numbers as they stand there.

    Raises:
        ValueError: it is no JSON, or it has NaN, a key that is given twice, or half a surrogate pair, which no text can have.
        RecursionError: it is nested too deeply.
    """
    found = json.loads(
        text,
        parse_float=Number,
        parse_int=_whole,
        parse_constant=_no_number,
        object_pairs_hook=_without_repeats,
    )
    if _HALF_A_PAIR.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half a surrogate pair") from None
    return found


def _whole(written: str) -> int | Number:
    return Number(written) if written == "-0" or len(written) > _MOST_DIGITS else int(written)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number that JSON has")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := first_repeated(name for name, _ in pairs)) is not None:
        raise ValueError(f"the key {twice!r} is given twice")
    return dict(pairs)


def _rows(rows: Iterable[tuple[int, Any]], wanted: Collection[str] | None) -> Table:
    """A table of objects: a key that a row lacks is a cell without a value."""
    names: dict[str, None] = {}
    columns: dict[str, list[Any]] = {}
    for count, (number, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"an object for each row; row {number} is {shown(row)}")
        for name, cell in row.items():
            names[name] = None
            if wanted is None or name in wanted:
                if name not in columns:
                    columns[name] = [None] * count
                columns[name].append(cell)
        for cells in columns.values():
            if len(cells) == count:
                cells.append(None)
    return Table(tuple(names), dict(columns))


def shown(cell: Any) -> str:
    """What a cell holds, as JSON has it, cut to 60 characters."""
    try:
        text = json.dumps(cell, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = type(cell).__name__
    return text if len(text) <= 60 else text[:59] + "…"


_TEXT_READERS: dict[str, Callable[[TextIO, Collection[str] | None], Table]] = {
    ".csv": lambda text, wanted: _delimited(text, wanted, ","),
    ".tsv": lambda text, wanted: _delimited(text, wanted, "\t"),
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
}
