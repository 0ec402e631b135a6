"""Takes cells of a table as texts, labels and lists: each as what it is, or not at all."""

import unicodedata
from collections.abc import Hashable, Sequence
from decimal import Decimal
from typing import Any

from chainfed_ray.data.tables import Table, parsed_json, shown
from chainfed_ray.errors import InvalidJob


def as_list(cell: Any) -> list[Any] | None:
    """The list in a cell, also one that is written as JSON, as in a CSV file; None if the cell holds no list."""
    if isinstance(cell, str):
        try:
            cell = parsed_json(cell)
        except (ValueError, RecursionError):
            return None
    return cell if isinstance(cell, list) else None


def texts(table: Table, key: str, column: str, source: str) -> list[str | None]:
    """The cells of a column as texts: a number as it stands in the file, None where there is nothing or only space.

    Raises:
        InvalidJob: a cell holds something else; ``key`` is the job's key that names the column.
    """
    return [_text(cell, key, column, source, row) for row, cell in enumerate(table.columns[column], start=1)]


def labels(table: Table, key: str, column: str, source: str) -> list[str | None]:
    """The cells of a column as names: like ``texts``, but truth values are names as well.

    Raises:
        InvalidJob: a cell holds something else, or the column has cells of two kinds, or names that look alike or are the same
            number.
    """
    cells = table.columns[column]
    kinds: dict[str, int] = {}
    for row, cell in enumerate(cells, start=1):
        if not _is_nothing(cell):
            kinds.setdefault(_kind(cell), row)
    if len(kinds) > 1 and set(kinds) <= {"a text", "a number", "a truth value"}:
        (first, _), (second, row) = list(kinds.items())[:2]
        expected = f"values of one kind in every row of {source}; row {row} holds {second}, rows before it {first}"
        raise InvalidJob.at(key, column, expected)
    named = [
        str(cell).lower() if isinstance(cell, bool) else _text(cell, key, column, source, row)
        for row, cell in enumerate(cells, start=1)
    ]
    _check_alike(named, "a number" in kinds, key, column, source)
    return named


def _check_alike(named: Sequence[str | None], numbers: bool, key: str, column: str, source: str) -> None:
    known: dict[Hashable, str] = {}
    seen = set[str]()
    for row, name in enumerate(named, start=1):
        if name is None or name in seen:
            continue
        seen.add(name)
        if "\0" in name:
            raise InvalidJob.at(key, column, f"names without null characters in {source}; row {row} has {name!r}")
        try:
            same: Hashable = Decimal(name) if numbers else _as_seen(name)
        except ArithmeticError:
            expected = "numbers of at most 18 digits in their exponent"
            raise InvalidJob.at(key, column, f"{expected} in {source}; row {row} has {name!a}") from None
        if (like := known.setdefault(same, name)) != name:
            expected = "numbers written in one way" if numbers else "names that differ by more than what cannot be seen"
            raise InvalidJob.at(key, column, f"{expected} in {source}; row {row} has {name!a}, rows before it {like!a}")


def _as_seen(name: str) -> str:
    """What people see of a name: without space around it and characters that show nothing, accents in one form."""
    return unicodedata.normalize("NFC", name.translate(_UNSEEN)).strip()


def _text(cell: Any, key: str, column: str, source: str, row: int) -> str | None:
    if _is_nothing(cell):
        return None
    if _kind(cell) not in ("a text", "a number"):
        raise InvalidJob.at(
            key, column, f"a text in every row of {source}; row {row} holds {_kind(cell)}: {shown(cell)}"
        )
    return f"{cell:f}" if isinstance(cell, Decimal) else str(cell)


def _is_nothing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and cell != cell)


def _kind(cell: Any) -> str:
    for kind, words in _KINDS:
        if isinstance(cell, kind):
            return words
    return f"a {type(cell).__name__}"


# Spaces without width, soft hyphens and marks of direction. Joiners are seen: they make other letters and other pictures.
_UNSEEN = dict.fromkeys(
    [0xAD, 0x61C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF]
)
_KINDS = (
    (str, "a text"),
    (bool, "a truth value"),
    ((int, float, Decimal), "a number"),
    (list, "a list"),
    (dict, "an object"),
    (bytes, "bytes"),
)
