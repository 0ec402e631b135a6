"""Keeps the rows of the accuracy benchmark in a file, so that an interrupted benchmark continues where it stopped."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy_protocols import Point


class NotOurRows(ValueError):
    """A file does not hold rows of this benchmark."""


class Names(NamedTuple):
    """The name of a row; ``alpha`` is None for IID."""

    dataset: str
    alpha: float | None
    method: str
    seed: int
    protocol: str


@dataclass(frozen=True)
class Row:
    """The result of a run.

    ``options`` is everything that the result depends on besides the row's name; the machine is not part of it. ``alpha`` is
    None for IID. ``accuracy`` is on the test split, None if the run was not tested; in the protocol ``target`` it is the target
    accuracy, None if it was not reached. ``whole_model_bytes`` is the peak memory of training the whole model in plain
    PyTorch. ``narrowest_window`` is the width of the narrowest window that a client trained.
    """

    dataset: str
    alpha: float | None
    method: str
    seed: int
    protocol: str
    accuracy: float | None
    client_steps: int | None
    client_cpu_seconds: float | None
    bytes_sent: int | None
    validation_accuracy: float | None
    rounds: int | None
    seconds: float | None
    start_layer: int | None = None
    stages: int = 1
    fixed_cpu_seconds: float = 0.0
    step_cpu_seconds: float = 0.0
    fixed_bytes: int = 0
    bytes_per_round: float = 0.0
    whole_model_bytes: int | None = None
    narrowest_window: int | None = None
    excluded: int = 0
    curve: tuple[Point, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


class Key(NamedTuple):
    """The key of a row: rows with the same name differ by their options."""

    names: Names
    options: dict[str, Any]


class Rows:
    """All rows so far. They are kept in ``file`` if it is given, and those that it holds already are read.

    Raises:
        NotOurRows: the file does not hold rows of this benchmark.
    """

    def __init__(self, file: Path | None) -> None:
        self.all: list[Row] = []
        self._file = file
        self._named = defaultdict[Names, list[Row]](list)
        for row in _read(file) if file and file.exists() else []:
            self._keep(row)

    def find(self, key: Key) -> Row | None:
        """The row of ``key``; None if there is none yet."""
        return next((row for row in self._named[key.names] if row.options == key.options), None)

    def same_run(self, key: Key, rounds: int) -> Row | None:
        """A row of a run with the same data, seed, options and rounds, whatever its method and protocol are called."""
        for row in self.all:
            alike = (row.dataset, row.alpha, row.seed) == (key.names.dataset, key.names.alpha, key.names.seed)
            if alike and row.options == key.options and row.rounds == rounds and row.protocol != "target":
                return row
        return None

    def add(self, row: Row) -> None:
        """Keep a row. The file is replaced at once, so a reader sees either the rows before or those after."""
        self._keep(row)
        if self._file:
            aside = self._file.with_name(self._file.name + ".partial")
            aside.write_text("[\n" + ",\n".join(json.dumps(asdict(each)) for each in self.all) + "\n]\n")
            aside.replace(self._file)

    def _keep(self, row: Row) -> None:
        self.all.append(row)
        self._named[Names(row.dataset, row.alpha, row.method, row.seed, row.protocol)].append(row)


def _read(file: Path) -> list[Row]:
    known = {each.name for each in fields(Row)}
    try:
        found = json.loads(file.read_text())
        assert isinstance(found, list)
        return [_row({name: value for name, value in row.items() if name in known}) for row in found]
    except (ValueError, TypeError, AttributeError, AssertionError) as error:
        raise NotOurRows(f"{file} does not hold rows of this benchmark: name another file") from error


def _row(found: dict[str, Any]) -> Row:
    return Row(**{**found, "curve": tuple(tuple(point) for point in found.get("curve", ()))})
