"""Labelled texts: where they come from, and how they are split."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from chainfed_ray import docstrings
from chainfed_ray.base_model import hub_is_reachable
from chainfed_ray.errors import InvalidJob
from chainfed_ray.sections import DataSpec

_READERS = {
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
}
_FORMS = "builtin:docstrings, path:<file.csv|jsonl|parquet> or hf:<dataset>[@<revision>]"
_FEWEST = 10


@dataclass(frozen=True)
class Split:
    """Texts and their labels; ``groups`` are each row's value of the column by which rows are dealt, if there is one."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: np.ndarray) -> "Split":
        """Some of the rows."""
        texts, labels, groups = (
            tuple(values[index] for index in indices) if values else ()
            for values in (self.texts, self.labels, self.groups)
        )
        return Split(texts, labels, groups)


@dataclass(frozen=True)
class Corpus:
    """The three splits, and the classes of the first in alphabetical order."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]


def load(spec: DataSpec, seed: int, column: str | None = None) -> Corpus:
    """Read the job's rows. A validation or test split that is not given is a tenth of ``train``, drawn by ``seed``.

    Training rows are dealt by ``column``, if it is given.

    Raises:
        InvalidJob: a source cannot be read, or its rows cannot be used.
    """
    train = _read("data.train", spec.train, "train", spec, column)
    if len(train) < _FEWEST:
        raise InvalidJob.at("data.train", spec.train, f"{_FEWEST} rows or more; there are {len(train)}")
    held_out: list[Split] = []
    shuffled = np.random.default_rng(seed).permutation(len(train))
    tenth = max(len(train) // 10, 1)
    for field, source in (("validation", spec.validation), ("test", spec.test)):
        if source is None:
            held_out.append(train.take(np.sort(shuffled[:tenth])))
            shuffled = shuffled[tenth:]
        else:
            held_out.append(_read(f"data.{field}", source, field, spec))
    train = train.take(np.sort(shuffled))
    classes = tuple(sorted(set(train.labels)))
    if len(classes) < 2:
        raise InvalidJob.at("data.label", spec.label, f"two classes or more; every training row has {classes[0]!r}")
    for field, split in (("validation", held_out[0]), ("test", held_out[1])):
        if unknown := sorted(set(split.labels) - set(classes)):
            raise InvalidJob.at(f"data.{field}", unknown[0], "only labels that the training rows have")
    return Corpus(train, held_out[0], held_out[1], classes)


def _read(field: str, source: str, split: str, spec: DataSpec, column: str | None = None) -> Split:
    scheme, _, name = source.partition(":")
    if source == "builtin:docstrings":
        return _built_in(source, column)
    if scheme == "path" and name:
        frame = _read_file(field, source, Path(name))
    elif scheme == "hf" and name:
        frame = _read_hub(field, source, name, split, spec.label)
    else:
        raise InvalidJob.at(field, source, _FORMS)
    return _columns(field, source, frame, spec, column)


def _built_in(source: str, column: str | None) -> Split:
    texts, labels = zip(*docstrings.rows(), strict=True)
    columns = {"text": texts, "label": labels}
    if column is not None and column not in columns:
        raise _no_column("fleet.partition.column", column, source, columns)
    return Split(texts, labels, columns[column] if column else ())


def _read_file(field: str, source: str, path: Path) -> pd.DataFrame:
    if path.suffix not in _READERS:
        raise InvalidJob.at(field, source, "a .csv, .jsonl or .parquet file")
    if not path.is_file():
        raise InvalidJob.at(field, source, "a file that exists")
    try:
        return _READERS[path.suffix](path)
    except Exception as error:  # each reader has its own kinds of complaint
        reason = " ".join(str(error).split())
        raise InvalidJob.at(field, source, f"a readable {path.suffix} file ({reason})") from None


def _read_hub(field: str, source: str, name: str, split: str, label: str) -> pd.DataFrame:
    import datasets  # takes a second, and only hub sources need it

    offline = os.environ.get("HF_DATASETS_OFFLINE") == "1" or os.environ.get("HF_HUB_OFFLINE") == "1"
    if not offline and not hub_is_reachable():
        raise InvalidJob.at(field, source, "a network, or HF_HUB_OFFLINE=1 and a data set that was downloaded before")
    repository, _, revision = name.partition("@")
    try:
        rows = datasets.load_dataset(repository, split=split, revision=revision or None)
        frame: pd.DataFrame = rows.to_pandas()
    except Exception as error:  # the hub's, the builder's and the file system's
        reason = " ".join(str(error).split())
        raise InvalidJob.at(field, source, f"a data set on the hub with a {split} split ({reason})") from None
    if isinstance(named := rows.features.get(label), datasets.ClassLabel):
        frame[label] = named.int2str(frame[label].tolist())
    return frame


def _columns(field: str, source: str, frame: pd.DataFrame, spec: DataSpec, column: str | None) -> Split:
    if frame.empty:
        raise InvalidJob.at(field, source, "one row or more; there are none")
    wanted = [("data.text", spec.text), ("data.label", spec.label)]
    if column is not None:
        wanted.append(("fleet.partition.column", column))
    for key, name in wanted:
        if name not in frame.columns:
            raise _no_column(key, name, source, frame.columns)
    for key, name in wanted:
        values = frame[name]
        empty = values.isna() | (values.astype(str).str.strip() == "")
        if empty.any():
            raise InvalidJob.at(key, name, f"a value in every row of {source}; row {int(empty.argmax()) + 1} has none")
    return Split(*(tuple(frame[name].astype(str)) for _, name in wanted))


def _no_column(key: str, name: str, source: str, columns: Iterable[object]) -> InvalidJob:
    return InvalidJob.at(key, name, f"a column of {source}: {', '.join(map(str, columns))}")
