"""Reads a job's rows from files, the hub or the built-in set, and splits them into training and held-out rows."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from chainfed_ray.data import docstrings
from chainfed_ray.data.chats import chat
from chainfed_ray.errors import InvalidJob
from chainfed_ray.hub import hub_is_reachable
from chainfed_ray.spec.sections import DataSpec

_READERS = {
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
}
_FORMS = "builtin:docstrings, path:<file.csv|jsonl|parquet> or hf:<dataset>[:<configuration>][@<revision>]"
_FEWEST = 10


Text = str | tuple[str, str] | tuple[tuple[str, str], ...]
"""What a row is to a model: a text, a (prompt, response) pair, or a chat of (role, content) pairs."""


@dataclass(frozen=True)
class Split:
    """The rows of a split: texts, their labels, and their values of the column that the partition keeps together.

    ``labels`` is empty if the job has no classes; ``groups`` is empty if no column is kept together.
    """

    texts: tuple[Text, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: np.ndarray) -> "Split":
        """The rows at ``indices``."""
        texts = tuple(self.texts[index] for index in indices)
        labels, groups = (
            tuple(values[index] for index in indices) if values else () for values in (self.labels, self.groups)
        )
        return Split(texts, labels, groups)


@dataclass(frozen=True)
class ColumnSelection:
    """The columns that a job uses. ``texts`` has (key, column) pairs; label and group columns are None if the job has none."""

    texts: tuple[tuple[str, str], ...]
    label: str | None
    group: str | None = None

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Every column as a (key, column) pair."""
        label = [("data.label", self.label)] if self.label is not None else []
        group = [("fleet.partition.column", self.group)] if self.group is not None else []
        return [*self.texts, *label, *group]


@dataclass(frozen=True)
class Corpus:
    """The three splits, and the classes of the training rows in alphabetical order.

    ``classes`` is empty if no labels are read.
    """

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def splits(self) -> tuple[tuple[str, Split], ...]:
        """The three splits with their names."""
        return ("train", self.train), ("validation", self.validation), ("test", self.test)


def load(spec: DataSpec, seed: int, column: str | None = None, classes: bool = True) -> Corpus:
    """Read the job's rows. A validation or test split that is not given is a tenth of ``train``, drawn with ``seed``.

    ``column`` is the column by which training rows are partitioned, if any. Without ``classes`` no labels are read.

    Raises:
        InvalidJob: a source cannot be read, or its rows cannot be used.
    """
    selection = ColumnSelection(spec.columns, spec.label if classes else None, column)
    train = _read("data.train", spec.train, "train", selection)
    if len(train) < _FEWEST:
        raise InvalidJob.at("data.train", spec.train, f"{_FEWEST} rows or more; there are {len(train)}")
    held_out: list[Split] = []
    shuffled = np.random.default_rng(seed).permutation(len(train))
    tenth = max(len(train) // 10, 1)
    # Held-out rows go to no client, so they need no groups.
    ungrouped = replace(selection, group=None)
    for field, source in (("validation", spec.validation), ("test", spec.test)):
        if source is None:
            held_out.append(train.take(np.sort(shuffled[:tenth])))
            shuffled = shuffled[tenth:]
        else:
            held_out.append(_read(f"data.{field}", source, field, ungrouped))
    train = train.take(np.sort(shuffled))
    found = tuple(sorted(set(train.labels)))
    if selection.label is not None:
        _check_classes(selection.label, found, held_out)
    return Corpus(train, held_out[0], held_out[1], found)


def read_table(field: str, source: str, split: str, label: str | None = None) -> pd.DataFrame:
    """The rows of ``source``, which the key ``field`` names. On the hub it reads the split called ``split``.

    Raises:
        InvalidJob: the source cannot be read, or it has no rows.
    """
    scheme, _, name = source.partition(":")
    if source == "builtin:docstrings":
        frame = pd.DataFrame(docstrings.rows(), columns=["text", "label"])
    elif scheme == "path" and name:
        frame = _read_file(field, source, Path(name))
    elif scheme == "hf" and name:
        frame = _read_hub(field, source, name, split, label)
    else:
        raise InvalidJob.at(field, source, _FORMS)
    if frame.empty:
        raise InvalidJob.at(field, source, "one row or more; there are none")
    return frame


def _check_classes(label: str, classes: tuple[str, ...], held_out: list[Split]) -> None:
    if len(classes) < 2:
        raise InvalidJob.at("data.label", label, f"two classes or more; every training row has {classes[0]!r}")
    for field, split in (("validation", held_out[0]), ("test", held_out[1])):
        if unknown := sorted(set(split.labels) - set(classes)):
            raise InvalidJob.at(f"data.{field}", unknown[0], "only labels that the training rows have")


def _read(field: str, source: str, split: str, selection: ColumnSelection) -> Split:
    frame = read_table(field, source, split, selection.label)
    for key, name in selection.columns:
        if name not in frame.columns:
            raise InvalidJob.at(key, name, f"a column of {source}: {', '.join(map(str, frame.columns))}")
    for key, name in selection.columns:
        if key == "data.response":
            continue  # a row without a response is dropped later
        values = frame[name]
        empty = values.isna() | (values.astype(str).str.strip() == "")
        if empty.any():
            raise InvalidJob.at(key, name, f"a value in every row of {source}; row {int(empty.argmax()) + 1} has none")
    labels, groups = (
        tuple(frame[column].astype(str)) if column is not None else () for column in (selection.label, selection.group)
    )
    return Split(_texts(frame, selection, source), labels, groups)


def _texts(frame: pd.DataFrame, selection: ColumnSelection, source: str) -> tuple[Text, ...]:
    (key, first), *others = selection.texts
    if key == "data.messages":
        return tuple(chat(value, first, f"row {row} of {source}") for row, value in enumerate(frame[first], start=1))
    if others:
        responses = frame[others[0][1]]
        responses = responses.astype(str).where(responses.notna(), "")
        return tuple(zip(frame[first].astype(str), responses, strict=True))
    return tuple(frame[first].astype(str))


def _read_file(field: str, source: str, path: Path) -> pd.DataFrame:
    if path.suffix not in _READERS:
        raise InvalidJob.at(field, source, "a .csv, .jsonl or .parquet file")
    if not path.is_file():
        raise InvalidJob.at(field, source, "a file that exists")
    try:
        return _READERS[path.suffix](path)
    except Exception as error:  # each reader raises errors of its own
        reason = " ".join(str(error).split())
        raise InvalidJob.at(field, source, f"a readable {path.suffix} file ({reason})") from None


def _read_hub(field: str, source: str, name: str, split: str, label: str | None) -> pd.DataFrame:
    import datasets  # its import takes a second, and only hub sources need it

    offline = os.environ.get("HF_DATASETS_OFFLINE") == "1" or os.environ.get("HF_HUB_OFFLINE") == "1"
    if not offline and not hub_is_reachable():
        raise InvalidJob.at(field, source, "a network, or HF_HUB_OFFLINE=1 and a data set that was downloaded before")
    address, _, revision = name.partition("@")
    repository, _, configuration = address.partition(":")
    try:
        rows = datasets.load_dataset(repository, configuration or None, split=split, revision=revision or None)
        frame: pd.DataFrame = rows.to_pandas()
    except Exception as error:  # errors of the hub, the data set's builder or the file system
        reason = " ".join(str(error).split())
        raise InvalidJob.at(field, source, f"a data set on the hub with a {split} split ({reason})") from None
    if label is not None and isinstance(named := rows.features.get(label), datasets.ClassLabel):
        frame[label] = named.int2str(frame[label].tolist())
    return frame
