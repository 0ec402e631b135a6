"""Labelled texts: where they come from, and how they are split."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from chainfed_ray import docstrings
from chainfed_ray.base_model import hub_is_reachable
from chainfed_ray.config import DataSpec
from chainfed_ray.errors import InvalidJob

_READERS = {
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
}
_FORMS = "builtin:docstrings, path:<file.csv|jsonl|parquet> or hf:<dataset>[@<revision>]"
_FEWEST = 10


@dataclass(frozen=True)
class Split:
    """Texts and their labels."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: np.ndarray) -> "Split":
        """Some of the rows."""
        return Split(tuple(self.texts[index] for index in indices), tuple(self.labels[index] for index in indices))


@dataclass(frozen=True)
class Corpus:
    """The three splits, and the classes of the first in alphabetical order."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]


def load(spec: DataSpec, seed: int) -> Corpus:
    """Read the job's rows. A validation or test split that is not given is a tenth of ``train``, drawn by ``seed``.

    Raises:
        InvalidJob: a source cannot be read, or its rows cannot be used.
    """
    train = _read("data.train", spec.train, "train", spec)
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


def _read(field: str, source: str, split: str, spec: DataSpec) -> Split:
    scheme, _, name = source.partition(":")
    if source == "builtin:docstrings":
        rows = docstrings.rows()
        return Split(tuple(text for text, _ in rows), tuple(label for _, label in rows))
    if scheme == "path" and name:
        frame = _read_file(field, source, Path(name))
    elif scheme == "hf" and name:
        frame = _read_hub(field, source, name, split, spec.label)
    else:
        raise InvalidJob.at(field, source, _FORMS)
    return _columns(field, source, frame, spec)


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


def _columns(field: str, source: str, frame: pd.DataFrame, spec: DataSpec) -> Split:
    if frame.empty:
        raise InvalidJob.at(field, source, "one row or more; there are none")
    for key, column in (("data.text", spec.text), ("data.label", spec.label)):
        if column not in frame.columns:
            raise InvalidJob.at(key, column, f"a column of {source}: {', '.join(map(str, frame.columns))}")
    for key, column in (("data.text", spec.text), ("data.label", spec.label)):
        values = frame[column]
        empty = values.isna() | (values.astype(str).str.strip() == "")
        if empty.any():
            raise InvalidJob.at(
                key, column, f"a value in every row of {source}; row {int(empty.argmax()) + 1} has none"
            )
    return Split(tuple(frame[spec.text].astype(str)), tuple(frame[spec.label].astype(str)))
